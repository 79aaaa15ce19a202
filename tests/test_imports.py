"""The direction of imports: each part of fedsim imports only parts of earlier layers."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

import fedsim

ROOT = Path(fedsim.__file__).parent
LAYERS = (
    ("errors",),
    ("system", "rng", "reference"),
    ("registry", "spellings"),
    ("config",),
    ("device", "own_code", "network"),
    ("data", "optim"),
    ("tasks", "models"),
    ("runs",),
    ("training",),
    ("federation",),
    ("experiments",),
    ("report", "bench"),
    ("cli", "api"),
    ("__main__",),
)
LAYER = {part: number for number, layer in enumerate(LAYERS) for part in layer}
WITHOUT_FLOWER = (
    *(
        "errors",
        "system",
        "rng",
        "reference",
        "registry",
        "spellings",
        "config",
        "device",
        "own_code",
        "network",
        "data",
        "optim",
    ),
    *("tasks", "models", "runs", "training", "report"),
)
OF_FLOWER = ("local_sgd", "screening", "tensor_array", "flower_strategy", "by_name", "object_state")  # in strategies/
OF_REPORTS = ("pandas", "matplotlib", "fedsim.report")


def imports_of(path: Path, in_functions: bool = True) -> set[str]:
    """Every module that a file imports."""
    found: set[str] = set()
    module = ast.parse(path.read_text())
    nodes: Iterable[ast.AST] = ast.walk(module) if in_functions else module.body
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def files_of(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py")) or [ROOT / f"{part}.py"]


@pytest.mark.parametrize("part", LAYER)
def test_a_part_imports_no_later_one(part: str) -> None:
    for file in files_of(part):
        parts = {name.split(".")[1] for name in imports_of(file) if name.startswith("fedsim.")}
        later = {other for other in parts & LAYER.keys() if other != part and LAYER[other] >= LAYER[part]}
        assert not later, f"{file} imports {later}"


def test_deploy_imports_errors_alone() -> None:
    for file in files_of("deploy"):
        parts = {name.split(".")[1] for name in imports_of(file) if name.startswith("fedsim.")}
        assert parts <= {"errors", "deploy"}, file


@pytest.mark.parametrize("part", WITHOUT_FLOWER)
def test_only_the_federation_imports_flower(part: str) -> None:
    for file in files_of(part):
        imported = {name.partition(".")[0] for name in imports_of(file)}
        assert not imported & {"flwr", "ray"}, file
        of_flower = {f"strategies.{name}" for name in OF_FLOWER}
        assert not imports_of(file, in_functions=False) & of_flower, file


def test_methods_import_torch_alone() -> None:
    for file in (ROOT.parent / "strategies").glob("*.py"):
        if file.stem not in OF_FLOWER:
            imported = imports_of(file, in_functions=False)
            assert "flwr" not in {name.partition(".")[0] for name in imported}, file
            assert not {f"strategies.{name}" for name in OF_FLOWER} & imported, file


def test_a_run_begins_before_what_only_its_report_needs_is_imported() -> None:
    for file in set(ROOT.rglob("*.py")) - set(files_of("report")):
        slow = {name for name in imports_of(file, in_functions=False) if name.startswith(OF_REPORTS)}
        assert not slow, file


def test_strategies_import_nothing_of_fedsim() -> None:
    for file in (ROOT.parent / "strategies").glob("*.py"):
        assert "fedsim" not in {name.partition(".")[0] for name in imports_of(file)}, file


def test_every_part_has_a_place() -> None:
    parts = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - set(LAYER) == {"__init__", "deploy"}
