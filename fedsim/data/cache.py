"""Arrays that are costly to make, kept on disk and mapped into memory: only the pages that are used are read.

In a deployment every message is a new process on the node; it maps what the first one decoded.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = 1  # of the arrays that are kept; another number makes them anew
Arrays = dict[str, NDArray[Any]]


def user_cache() -> Path:
    """fedsim's folder in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "fedsim"


def cached(sources: Iterable[Path], names: Sequence[str], make: Callable[[], Arrays]) -> Arrays:
    """The arrays `names` that `make` makes of the files `sources`: mapped from the cache, or made and kept there.

    A source of another size or time, or at another place, is another source. The arrays are copy-on-write: what is
    written to them stays in this process. Where the cache cannot be written they stay in memory, which is said once.
    """
    sources = [source.absolute() for source in sources]
    try:
        stats = [source.stat() for source in sources]
    except OSError:  # `make` knows best what to say of a missing file
        return make()
    # A folder for each place, in it one for what lies there now
    place = user_cache() / "arrays" / _digest([str(source) for source in sources])
    folder = place / _digest([FORMAT, *((stat.st_size, stat.st_mtime_ns) for stat in stats)])
    if kept := _mapped(folder, names):
        return kept
    made = make()
    try:
        _keep(made, folder)
    except OSError as error:
        _say(f"images cannot be kept in {user_cache()} ({error.strerror}): every process decodes them anew")
        return made
    return _mapped(folder, names) or made


def _digest(key: list[Any]) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def _mapped(folder: Path, names: Iterable[str]) -> Arrays:
    """The arrays in `folder`; none where one of them is missing or damaged."""
    try:
        return {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in names}
    except (OSError, ValueError, EOFError):
        return {}


def _keep(arrays: Arrays, folder: Path) -> None:
    """Write `folder` whole or not at all, then remove what else lies at its place: of another key, or broken off.

    Of processes that start at once the first one's stays; the others find theirs refused, or gone, and take it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    try:
        for name, array in arrays.items():
            with (part / f"{name}.npy").open("wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
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
