"""A cache on disk of arrays that are slow to make, mapped into memory: only the pages that are used are read.

In a deployment every message is a new process on the node, which maps the cached arrays in milliseconds. Their CRC-32
takes longer, so it is checked only when a process that trains or tests by itself first loads them and when a node joins
a run, not for each message: damage in between is not noticed.
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
from fedsim.system.locks import READING

FORMAT = 3  # of the cached arrays; those in another format are not used
CHECKSUMS = "crc32.json"  # of the array files in the same folder
Arrays = dict[str, NDArray[Any]]


def user_cache() -> Path:
    """fedsim's folder in the user's cache folder."""
    named = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(named).expanduser().absolute() / "fedsim"
    except RuntimeError as error:  # ~user, or a user without a home
        raise UserError(f"the cache folder {named} is in no user's home: set XDG_CACHE_HOME to another") from error


def cached(sources: Iterable[Path], names: Sequence[str], make: Callable[[], Arrays], form: object = None) -> Arrays:
    """The arrays `names` that `make` makes from the files `sources`: mapped from the cache, or made and cached.

    Sources are identified by path, size and modification time; `form`, a JSON value, is what else the arrays depend on.
    The arrays are copy-on-write. If the cache cannot be written, they stay in memory, which is reported once.
    """
    folder = _folder_of(sources, form)
    if folder is None:  # the error of `make` says more about a missing file
        return make()
    if found := _mapped(folder, names):
        return found
    made = make()
    try:
        _store(made, folder)
    except OSError as error:
        _warn_once(f"cannot cache images in {user_cache()} ({error.strerror or error}): every process decodes them")
        return made
    return _mapped(folder, names) or made


def discard_damaged(sources: Iterable[Path], form: object = None) -> bool:
    """Remove the cached arrays of `sources` if their checksums do not match; returns whether they were removed."""
    folder = _folder_of(sources, form)
    if folder is None or not folder.exists():
        return False
    try:
        if json.loads((folder / CHECKSUMS).read_text()) == _checksums(folder):
            return False
    except (OSError, ValueError):
        pass
    print(f"the cached images in {folder} are damaged: they are decoded again", file=sys.stderr, flush=True)
    try:
        aside = folder.rename(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    except FileNotFoundError:  # another process has removed it
        return True
    except OSError as error:
        raise UserError(f"{folder} cannot be removed ({error.strerror}): remove it, or set XDG_CACHE_HOME") from error
    shutil.rmtree(aside, ignore_errors=True)
    return True


def _folder_of(sources: Iterable[Path], form: object) -> Path | None:
    """The cache folder of `sources`: PATHS-AND-FORM/SIZES-AND-TIMES, as digests. None if a source is missing."""
    sources = [source.absolute() for source in sources]
    try:
        stats = [source.stat() for source in sources]
    except OSError:
        return None
    parent = user_cache() / "arrays" / _digest([form, *(str(source) for source in sources)])
    return parent / _digest([FORMAT, *((stat.st_size, stat.st_mtime_ns) for stat in stats)])


def _digest(key: list[Any]) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def _checksums(folder: Path) -> dict[str, int]:
    """The CRC-32 of each array file in `folder`, by its name."""
    checksums = {}
    for path in sorted(folder.glob("*.npy")):
        checksums[path.name] = 0
        with path.open("rb") as file:
            while block := file.read(2**20):
                checksums[path.name] = zlib.crc32(block, checksums[path.name])
    return checksums


def _mapped(folder: Path, names: Iterable[str]) -> Arrays:
    """The arrays in `folder`; none if one of them is missing or has a damaged header."""
    try:
        with READING:
            return {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in names}
    except Exception:  # NumPy does not document what a damaged header raises
        return {}


def _store(arrays: Arrays, folder: Path) -> None:
    """Write `folder` atomically, then remove everything else beside it: older versions and partial folders.

    If several processes write it at once, the first one wins and the others use its folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    try:
        for name, array in arrays.items():
            with (part / f"{name}.npy").open("wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        (part / CHECKSUMS).write_text(json.dumps(_checksums(part)))
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
def _warn_once(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
