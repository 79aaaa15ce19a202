"""Many runs, one by one or on Ray: all checked before the first begins, finished ones skipped, failures named."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

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

from fedsim.config import Config, Mode
from fedsim.data.datasets import training_images
from fedsim.device import resolve
from fedsim.errors import RunFailed, UserError
from fedsim.experiments.execute import Engine, check, execute
from fedsim.experiments.study import Cell
from fedsim.records import Row
from fedsim.training.centralized import whole_epochs
from fedsim.training.run_plan import run_plan


class Spread(NamedTuple):
    """Cells side by side on Ray: its address (empty: a Ray of its own), and the share of a node that each takes."""

    address: str
    cpus: float | None = None  # the threads of its steps
    gpus: float | None = None  # a whole one


class Cost(NamedTuple):
    """What a run takes: training images (each counted as often as it is seen), local steps of a worker, syncs."""

    images: float
    local_steps: int
    syncs: int


def cost(config: Config, mode: Mode) -> Cost:
    """The cost of `config` to its end, known without running it."""
    images = training_images(config)
    if mode == "centralized":
        epochs, _ = whole_epochs(config)
        return Cost(float(epochs * images), epochs * -(-images // config.batch_size), 0)
    plan = run_plan(config, images)
    steps = plan.first_step(plan.rounds + 1)
    return Cost(float(steps * config.clients_per_round * config.batch_size), steps, plan.rounds)


def placed(cells: Sequence[Cell], folder: Path, spread: Spread | None = None) -> list[Cell]:
    """`cells` resolved for where they will run, in `folder`, checked against the data; nothing is written yet."""
    found = []
    for cell in cells:
        try:
            config = resolve(cell.config.changed({"results-dir": str(folder)}), cell.mode, here=spread is None)
            check(config if spread is None else config.changed({"device": "cpu"}), cell.mode)
        except UserError as error:
            raise UserError(f"{cell.config.name}: {error}") from error
        found.append(cell._replace(config=config))
    return found


@contextlib.contextmanager
def room_for(cells: Sequence[Cell], spread: Spread | None) -> Iterator[None]:
    """Within it, `cells` (placed) can be run: with `spread`, on the Ray cluster that it names."""
    if spread is None:
        yield
        return
    from fedsim.experiments.ray_sweep import cluster  # Ray takes its time to import

    with cluster(spread, cells):
        yield


def run_cells(
    cells: Sequence[Cell], engine: Engine, rerun: bool, console: Console, spread: Spread | None = None
) -> dict[str, str]:
    """Run all `cells` (placed, with room for them); a cell that fails does not keep the others from running.

    Returns why each that failed did, by its name.
    """
    failures: dict[str, str] = {}
    with _progress(console) as progress:
        overall = progress.add_task("cells", total=len(cells))
        for name, why in _outcomes(cells, engine, rerun, progress, spread):
            if why:
                failures[name] = why
                progress.console.print(f"{name} failed: {why}", style="red", highlight=False, markup=False)
            progress.advance(overall)
    return failures


def _outcomes(
    cells: Sequence[Cell], engine: Engine, rerun: bool, progress: Progress, spread: Spread | None
) -> Iterator[tuple[str, str]]:
    """The name of each cell as it ends, and why it failed or nothing."""
    if spread is None:
        return _one_by_one(cells, engine, rerun, progress)
    from fedsim.experiments.ray_sweep import run_on_ray

    return run_on_ray(cells, engine, rerun, spread, progress.console)


def _one_by_one(cells: Sequence[Cell], engine: Engine, rerun: bool, progress: Progress) -> Iterator[tuple[str, str]]:
    for _, mode, config in cells:
        task = progress.add_task(config.name, total=_last_round(config, mode))
        why = ""
        try:
            execute(config, mode, engine, functools.partial(_advance, progress, task), rerun)
        except RunFailed as error:
            why = str(error)
        progress.remove_task(task)
        yield config.name, why


def fail_if_any(failures: dict[str, str], cells: int) -> None:
    """Fail, naming the cells that did; called when everything else has been told."""
    if failures:
        raise RunFailed(f"{len(failures)} of {cells} cells failed: {', '.join(failures)}")


def _last_round(config: Config, mode: Mode) -> int:
    return whole_epochs(config)[1] if mode == "centralized" else run_plan(config, training_images(config)).last_round


def _advance(progress: Progress, task: TaskID, row: Row) -> None:
    progress.update(task, completed=row["round"])


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
