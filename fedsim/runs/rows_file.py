"""A file of rows that only grows, whose SHA-256 is known without reading it again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

from fedsim.errors import RunFailed
from fedsim.system.files import atomic_write, open_file, open_to_append

FileState = tuple[int, int, int, int]


class RowsFile:
    """The file at `path`, which this process alone writes to; `size` is in bytes.

    It is read again only where it is not as this process left it, by its size and times.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._sha256 = hashlib.sha256()  # of what this process has written, and of what was there when it began
        self._seen: FileState | None = None  # the file when it was last known to have this digest

    def begin(self, content: bytes) -> None:
        """Continue from `content`, to which the file is cut."""
        self._sha256, self.size = hashlib.sha256(content), len(content)
        with atomic_write(self.path) as file:
            file.write(content)
        with open_file(self.path) as file:
            self._seen = _seen(file)

    def append(self, line: bytes) -> None:
        """Append a complete line; it is on disk after the next `flush`."""
        with open_to_append(self.path) as file:
            untouched = _seen(file) == self._seen
            file.write(line)
            file.flush()
            self._seen = _seen(file) if untouched else None
        self._sha256.update(line)
        self.size += len(line)

    def flush(self, read: bool = False) -> str:
        """Flush the file to disk and return its SHA-256; raises RunFailed where another process has changed it.

        A change that left size and times as they are is seen if the file is `read`.
        """
        known = self._sha256.hexdigest()
        with open_file(self.path) as file:
            os.fsync(file.fileno())
            seen = _seen(file)
            if (read or seen != self._seen) and hashlib.file_digest(file, "sha256").hexdigest() != known:
                raise RunFailed(
                    f"{self.path} was changed during the run: restore its rows; the same command then resumes the run"
                )
        self._seen = seen
        return known


def _seen(file: BinaryIO) -> FileState:
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
