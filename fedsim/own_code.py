"""The user's own code that the keys of a run name as ``package.module:function``, known by the digests of its files.

They are the file of each module and the files that it imports, by the import statements in them, from the same folder:
modules beside it, or the other modules of its package. Not among them are other installed packages, what is imported
by other means, and files that the code reads. Packages with a recorded version are known by it.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.util
import itertools
import sys
from collections.abc import Hashable, Iterator
from pathlib import Path

from fedsim.config import CHOSEN, Config
from fedsim.registry import function_of, is_own
from fedsim.system.locks import READING
from fedsim.system.provenance import PACKAGES
from strategies.arguments import CHAIN, kebab, split_name

OF_THE_SERVER = ("outer", "mean", "topology", "test_model", "metrics")  # clients do not run the code of these fields
RECORDED = {"fedsim", "strategies", *(package.replace("-", "_") for package in PACKAGES)}  # by their versions
INSTALLED = ("site-packages", "dist-packages")


def own_code(config: Config, of_client: bool = False) -> dict[str, str]:
    """The SHA-256 of each file, by its path in its folder; `of_client`: of the code alone that clients run."""
    named = [
        (kebab(field), split_name(part)[0])
        for field in CHOSEN
        if not (of_client and field in OF_THE_SERVER)
        for part in CHAIN.split(getattr(config, field))
        if is_own(part)
    ]
    files: dict[str, str] = {}
    for key, value in named:
        function = function_of(key, value)
        files |= _digests(value.partition(":")[0], function if isinstance(function, Hashable) else None)
    return dict(sorted(files.items()))


@functools.lru_cache(maxsize=32)
def _digests(module: str, function: Hashable) -> dict[str, str]:
    """The digests of a module's files when its `function` is first asked for, soon after their import.

    A process that does not import a module again runs the code that it has, however the files change.
    """
    first = getattr(sys.modules[module], "__file__", None)
    top = module.partition(".")[0]
    if not first or top in RECORDED:
        return {}
    file = Path(first).absolute()
    root = file.parents[module.count(".") + (file.name == "__init__.py")]
    digests: dict[str, str] = {}
    waiting, seen = [module], {module}
    while waiting:
        name = waiting.pop()
        if not (path := _file_of(root, name)):
            continue
        content = path.read_bytes()
        digests[path.relative_to(root).as_posix()] = hashlib.sha256(content).hexdigest()
        for other in _imported(content, name, path.name == "__init__.py"):
            of_top = other.partition(".")[0]
            if other not in seen and of_top not in RECORDED and (of_top == top or root.name not in INSTALLED):
                seen.add(other)
                waiting.append(other)
    return digests or {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}  # compiled, or of another name


def _file_of(root: Path, module: str) -> Path | None:
    """The source file of a module below `root`, if it is there."""
    path = root.joinpath(*module.split("."))
    places = (path / "__init__.py", path.with_name(f"{path.name}.py"))
    return next((place for place in places if place.is_file()), None)


def _imported(source: bytes, module: str, is_package: bool) -> Iterator[str]:
    """The names of all that `source`, the code of `module`, imports, and of the packages that it is in."""
    yield from itertools.accumulate(module.split("."), "{}.{}".format)
    try:
        with READING:
            nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError:  # of a module that is imported in some case alone
        return
    package = module if is_package else module.rpartition(".")[0]
    for node in nodes:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            with contextlib.suppress(ImportError):  # beyond the top of the package
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            yield from itertools.accumulate(name.split("."), "{}.{}".format)
