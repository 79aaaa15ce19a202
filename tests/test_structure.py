"""What the syntax tree tells of the code: how many parameters a function has, and that a name stands for one thing."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedsim

ROOT = Path(fedsim.__file__).parents[1]
FILES = [path for package in ("fedsim", "strategies") for path in sorted((ROOT / package).rglob("*.py"))]
MOST_PARAMETERS = 6
OF_OPTIMIZERS = {  # their arguments, which a user gives by name: `--optimizer lars:trust=0.01,nesterov=true`
    "fedsim/optim/lamb.py": ["__init__"],
    "fedsim/optim/lars.py": ["__init__"],
    "fedsim/optim/named.py": ["lamb", "lars", "muon"],
}
COMMANDS = "fedsim/cli/commands.py"  # a command has the name of what it calls
ENTRY_POINTS = {"app", "main"}  # what Flower, or a process of its own, begins with
Function = ast.FunctionDef | ast.AsyncFunctionDef


def path_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def parameters(function: Function) -> int:
    """Without `self`, `*args` and `**keys`."""
    names = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return len([each for each in names if each.arg not in ("self", "cls")])


def functions(file: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, Function):
            yield node


@pytest.mark.parametrize("file", FILES, ids=path_of)
def test_a_function_has_six_parameters_or_fewer(file: Path) -> None:
    for function in functions(file):
        if parameters(function) > MOST_PARAMETERS:
            assert function.name in OF_OPTIMIZERS.get(path_of(file), []), f"{function.name}: {parameters(function)}"


def test_a_public_class_or_function_has_a_name_of_its_own() -> None:
    named = Counter(
        node.name
        for file in FILES
        if path_of(file) != COMMANDS
        for node in ast.parse(file.read_text()).body
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")
    )
    assert {name for name, count in named.items() if count > 1} <= ENTRY_POINTS
