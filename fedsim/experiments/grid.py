"""The K/J grid: every cell a run of its own, finished ones skipped, then the table, the CSV and the plot."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.experiments.cells import Spread, fail_if_any, placed, room_for, run_cells
from fedsim.experiments.execute import Engine
from fedsim.experiments.presets import configure
from fedsim.experiments.study import Cell
from fedsim.records import default_name
from fedsim.report.page import show_results


class Grid(NamedTuple):
    """The cells: every K with every J, each with every seed."""

    clients: list[int]
    local_steps: list[int]
    seeds: list[int]


DEMO_GRID = Grid(clients=[2, 4, 8], local_steps=[1, 5, 25], seeds=[2025])
DEMO_KEYS = {
    "dataset": "synthetic",
    "model": "lenet5",
    "batch-size": 32,
    "lr": 0.02,
    "epochs": 4.0,
    "evaluate-every": 1000000,  # test the last round alone
    "checkpoint-every": 1000000,
    "name": "demo",
}


def run_demo(results_dir: str, rerun: bool, console: Console) -> None:
    """A grid on synthetic images for a first look, the same on every machine."""
    run_grid(DEMO_GRID, {**DEMO_KEYS, "results-dir": results_dir}, "", "fleet", rerun, console)


def integers(name: str, listed: str) -> list[int]:
    """`listed` as whole numbers between commas, each once."""
    try:
        return sorted({int(part) for part in listed.split(",")})
    except ValueError:
        raise UserError(f"{name} = {listed!r} is no list of whole numbers: for instance --{name} 4,12") from None


def run_grid(
    grid: Grid,
    keys: Mapping[str, Any],
    preset: str,
    engine: Engine,
    rerun: bool,
    console: Console,
    spread: Spread | None = None,
) -> None:
    """Run all cells of `grid` with the other `keys`, one by one or as `spread` says, in one folder.

    Every cell's configuration is checked before the first begins. A cell that fails is named at the end and
    does not keep the others from running.
    """
    folder = grid_folder(configure(keys, preset))
    cells = placed([cell(k, j, seed, keys, preset) for k, j, seed in itertools.product(*grid)], folder, spread)
    with room_for(cells, spread):
        failures = run_cells(cells, engine, rerun, console, spread)

    show_results(folder, console, axes=("clients", "local-steps"), save_as="grid")
    fail_if_any(failures, len(cells))


def grid_folder(base: Config) -> Path:
    """The folder of a grid's cells: its name, or one made from what all cells share."""
    if base.name:
        name = base.name
    else:
        common = default_name(base.changed({"clients": 1, "local-steps": 1, "seed": 0}), "localsgd")
        name = "grid" + common.removeprefix("localsgd").replace("-k1-j1-seed0", "")
    return Path(base.results_dir).expanduser().absolute() / name


def cell(clients: int, local_steps: int, seed: int, keys: Mapping[str, Any], preset: str) -> Cell:
    """One cell of the grid."""
    own = {
        "clients": clients,
        "local-steps": local_steps,
        "seed": seed,
        "name": f"k{clients}-j{local_steps}-seed{seed}",
    }
    return Cell((clients, local_steps), "localsgd", configure({**keys, **own}, preset))
