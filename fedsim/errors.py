"""The errors that the command line reports as one line and an exit code."""


class UserError(ValueError):
    """Bad input; the message names the key and the remedy. Exit code 2."""

    exit_code = 2


class RunFailed(RuntimeError):
    """The run itself failed, for instance because no client sent a usable update. Exit code 1."""

    exit_code = 1


class RunInProgress(UserError):
    """Another process is running this run."""
