"""Files as fedsim keeps them: regular ones, replaced whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import BinaryIO


def open_file(path: Path) -> BufferedReader:
    """Open `path` to read; raises OSError for what is no file.

    A FIFO there would be waited for without end, and a device may be read without end.
    """
    return open(path, "rb", opener=_regular)


def open_to_append(path: Path) -> BufferedWriter:
    """Open `path` to append to it, created if it does not exist; raises OSError for what is no file."""
    return open(path, "ab", opener=_regular)


def read_file(path: Path) -> bytes:
    """The content of `path`; raises OSError for what is no file."""
    with open_file(path) as file:
        return file.read()


def _regular(path: str, flags: int) -> int:
    number = os.open(path, flags | os.O_NONBLOCK, 0o666)
    kind = os.fstat(number).st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # a folder is refused by `open` itself
        os.close(number)
        raise OSError(errno.EINVAL, "not a file", path)
    return number


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Context manager: a file that appears as `path` only when all of it is on disk."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
