"""Bad input and failed runs in one line: Flower logs what an app raises with its traceback."""

from __future__ import annotations

import logging

from fedsim.errors import RunFailed, UserError


class OneLine(logging.Filter):
    """Reduce a log record of a `UserError` or `RunFailed` to the message of that error."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, UserError | RunFailed):
            record.msg, record.args, record.exc_info = f"error: {error}", (), None
        return True


def log_errors_in_one_line() -> None:
    """Let Flower's logger in this process use `OneLine`."""
    logger = logging.getLogger("flwr")
    if not any(isinstance(each, OneLine) for each in logger.filters):
        logger.addFilter(OneLine())
