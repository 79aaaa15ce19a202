"""Arrays that are costly to make, kept on disk and mapped into memory: only the pages that are used are read.

In a deployment every message is a new process on the node, which maps what the first one decoded, in milliseconds.
To read all of it takes longer, so the CRC-32 kept with it is checked when a process that trains or tests by itself
first loads it, and when a node joins a run, but not for each message: what changes in between is not noticed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import UserError

FORMAT = 2  # of the arrays that are kept; those of another format are made again
CHECKSUMS = "crc32.json"  # of each file beside it
Arrays = dict[str, NDArray[Any]]


def user_cache() -> Path:
    """fedsim's folder in the user's cache folder."""
    named = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(named).expanduser().absolute() / "fedsim"
    except RuntimeError as error:  # ~user, or a user without a home
        raise UserError(f"the cache folder {named} is in no user's home: set XDG_CACHE_HOME to another") from error


def cached(sources: Iterable[Path], names: Sequence[str], make: Callable[[], Arrays]) -> Arrays:
    """The arrays `names` that `make` makes of the files `sources`: mapped from the cache, or made and kept there.

    A source of another size or time, or at another place, is another source. The arrays are copy-on-write: what is
    written to them stays in this process. If the cache cannot be written they stay in memory, which is reported once.
    """
    folder = _folder_of(sources)
    if folder is None:  # `make` knows best what to say of a missing file
        return make()
    if kept := _mapped(folder, names):
        return kept
    made = make()
    try:
        _keep(made, folder)
    except OSError as error:
        _say(f"images cannot be kept in {user_cache()} ({error.strerror or error}): every process decodes them again")
        return made
    return _mapped(folder, names) or made


def discard_damaged(sources: Iterable[Path]) -> bool:
    """Read what is kept of `sources`; if any bit of it has changed it is removed, to be made again. Whether it was."""
    folder = _folder_of(sources)
    if folder is None or not folder.exists():
        return False
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
        if checksums == {path.name: _crc32(path) for path in sorted(folder.glob("*.npy"))}:
            return False
    except (OSError, ValueError):
        pass
    print(f"the images kept in {folder} are damaged: they are decoded again", file=sys.stderr, flush=True)
    try:
        aside = folder.rename(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    except FileNotFoundError:  # another process has found the same
        return True
    except OSError as error:
        raise UserError(f"{folder} cannot be removed ({error.strerror}): remove it, or set XDG_CACHE_HOME") from error
    shutil.rmtree(aside, ignore_errors=True)
    return True


def _folder_of(sources: Iterable[Path]) -> Path | None:
    """A folder for each place that sources lie at, in it one for what lies there now; None if a source is missing."""
    sources = [source.absolute() for source in sources]
    try:
        stats = [source.stat() for source in sources]
    except OSError:
        return None
    place = user_cache() / "arrays" / _digest([str(source) for source in sources])
    return place / _digest([FORMAT, *((stat.st_size, stat.st_mtime_ns) for stat in stats)])


def _digest(key: list[Any]) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _mapped(folder: Path, names: Iterable[str]) -> Arrays:
    """The arrays in `folder`; none if one of them is missing, or its header damaged."""
    try:
        return {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in names}
    except Exception:  # NumPy evaluates the header, and documents no exceptions for that
        return {}


def _keep(arrays: Arrays, folder: Path) -> None:
    """Write `folder` whole or not at all, then remove what else lies at its place: of another key, or interrupted.

    Of processes that start at once the first one's stays; the others find theirs refused, or gone, and use it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    try:
        for name, array in arrays.items():
            with (part / f"{name}.npy").open("wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        checksums = {path.name: _crc32(path) for path in sorted(part.glob("*.npy"))}
        (part / CHECKSUMS).write_text(json.dumps(checksums))
        if folder.exists() and not _mapped(folder, arrays):
            shutil.rmtree(folder)
        part.rename(folder)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        if not _mapped(folder, arrays):
            raise
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)


@functools.cache
def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
