"""The K/J grid: every cell a run of its own, finished ones skipped, then the table, the CSV and the plot."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedsim.config import Config
from fedsim.data import check_shards, load_dataset
from fedsim.errors import RunFailed, UserError
from fedsim.machine import resolve
from fedsim.presets import configure
from fedsim.records import Row, default_name
from fedsim.report import grid_table, plot_grid, read_cells, write_csv
from fedsim.runs import Engine, execute
from fedsim.sync import plan


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


def run_grid(grid: Grid, keys: Mapping[str, Any], preset: str, engine: Engine, rerun: bool, console: Console) -> None:
    """Run all cells of `grid` with the other `keys`, one after the other, in one folder.

    Every cell's configuration is checked before the first begins. A cell that fails is named at the end and
    does not keep the others from running.
    """
    folder = grid_folder(configure(keys, preset))
    cells = [cell(k, j, seed, keys, preset, folder) for k, j, seed in itertools.product(*grid)]
    failures: dict[str, str] = {}
    with _progress(console) as progress:
        overall = progress.add_task("cells", total=len(cells))
        for config in cells:
            rounds = plan(config, len(load_dataset(config).train)).last_round
            task = progress.add_task(config.name, total=rounds)
            try:
                execute(config, "localsgd", engine, functools.partial(_advance, progress, task), rerun)
            except RunFailed as error:
                failures[config.name] = str(error)
                progress.console.print(f"[red]{config.name} failed:[/red] {error}", highlight=False)
            progress.remove_task(task)
            progress.advance(overall)

    rows = read_cells(folder)
    console.print(grid_table(rows))
    write_csv(rows, folder / "grid.csv")
    plot_grid(rows, folder / "grid.png")
    console.print(f"{folder / 'grid.csv'}\n{folder / 'grid.png'}", soft_wrap=True, highlight=False)
    if failures:
        raise RunFailed(f"{len(failures)} of {len(cells)} cells failed: {', '.join(failures)}")


def grid_folder(base: Config) -> Path:
    """The folder of a grid's cells: its name, or one made from what all cells share."""
    if base.name:
        name = base.name
    else:
        common = default_name(base.changed({"clients": 1, "local-steps": 1, "seed": 0}), "localsgd")
        name = "grid" + common.removeprefix("localsgd").replace("-k1-j1-seed0", "")
    return Path(base.results_dir).expanduser().absolute() / name


def cell(clients: int, local_steps: int, seed: int, keys: Mapping[str, Any], preset: str, folder: Path) -> Config:
    """The resolved configuration of one cell, checked against the data."""
    own = {"clients": clients, "local-steps": local_steps, "seed": seed}
    place = {"results-dir": str(folder), "name": f"k{clients}-j{local_steps}-seed{seed}"}
    config = resolve(configure({**keys, **own, **place}, preset), "localsgd")
    check_shards(config, len(load_dataset(config).train), clients)
    return config


def _advance(progress: Progress, task: TaskID, row: Row) -> None:
    progress.update(task, completed=row["round"])


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
