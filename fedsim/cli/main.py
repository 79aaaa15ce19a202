"""``fedsim``: bad input and failed runs are reported on one line, with an exit code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from io import TextIOWrapper
from typing import NoReturn

import click

from fedsim.cli.commands import cli
from fedsim.errors import RunFailed, UserError
from fedsim.spellings import now
from fedsim.system.interrupts import interruption


def main() -> None:
    """Run the command in ``sys.argv``; exit with 2 on bad input, 1 on a failed run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # paths may have characters that the terminal lacks
    with _errors_in_one_line():
        # A shell completes the command that is installed, also where its script is shown by another name
        code = cli(prog_name="fedsim", standalone_mode=False)  # what a command exits with, as --version does
    if isinstance(code, int):
        sys.exit(code)


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Context manager: print an error on one line and exit with its code."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.message)
        sys.exit(2)
    except click.NoSuchOption as error:
        option = error.option_name
        written_now = now(option.removeprefix("--").removeprefix("no-"))
        _fail(f"{option} is written {written_now} now" if written_now else error.format_message(), 2)
    except click.UsageError as error:
        _fail(error.format_message(), 2)
    except (UserError, RunFailed) as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2)
    except MemoryError:
        _fail("out of memory: give a smaller --batch-size, --local-steps or data set", 1)


def _fail(message: str, code: int) -> NoReturn:
    """Print the message on one line, with control characters escaped, and exit."""
    if interrupted := interruption(sys.exception()):
        raise interrupted
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    print(f"error: {line}", file=sys.stderr)
    sys.exit(code)
