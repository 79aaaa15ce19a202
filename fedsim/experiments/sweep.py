"""Run the cells of studies: check all before the first starts, skip finished ones, report failed ones."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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

from fedsim.config import Engine
from fedsim.data.datasets import training_images
from fedsim.errors import RunFailed, RunInProgress, UserError
from fedsim.experiments.execute import check, execute, resolve_run
from fedsim.experiments.study import STORED, Cell, Study
from fedsim.records import Row, Run, atomic_write, run_folder
from fedsim.training.centralized import whole_epochs
from fedsim.training.run_plan import run_plan

PLAIN: Any = {"soft_wrap": True, "highlight": False, "markup": False}  # of Console.print: the line as it is
Failure = RunFailed | UserError | None  # why a cell failed, or None
Outcome = tuple[Cell, Failure]


class Runner(Protocol):
    """How cells are run: where, and by which engine."""

    @property
    def engine(self) -> Engine:
        """The engine of each cell, or auto."""

    @property
    def here(self) -> bool:
        """Whether cells run on this machine, so that it must have their devices."""

    def started(self, cells: Sequence[Cell]) -> AbstractContextManager[None]:
        """Context manager within which `cells` can be run."""

    def run(self, cells: Sequence[Cell], rerun: bool, patience: float, progress: Progress) -> Iterator[Outcome]:
        """Run `cells`, also finished ones if `rerun`; yields the outcome of each as it ends.

        It is RunInProgress for a cell that another process still runs after `patience` seconds.
        """


@dataclass(frozen=True)
class OneByOne:
    """Runs cells in this process."""

    engine: Engine
    here = True

    def started(self, cells: Sequence[Cell]) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def run(self, cells: Sequence[Cell], rerun: bool, patience: float, progress: Progress) -> Iterator[Outcome]:
        for cell in cells:
            task = progress.add_task(cell.config.name, total=_last_round(cell))
            failure: Failure = None
            try:
                config, engine = resolve_run(cell.config, cell.mode, self.engine)
                execute(config, cell.mode, engine, _advance(progress, task), rerun, patience)
            except (RunFailed, UserError) as error:
                failure = error
            finally:
                progress.remove_task(task)
            yield cell, failure


def run_studies(
    studies: Sequence[tuple[Study, Sequence[Cell]]], results: Path, runner: Runner, rerun: bool, console: Console
) -> list[str]:
    """Check the given cells of all studies, then run them in the folders ``RESULTS/STUDY``.

    The other cells run also if one fails. Returns the names of those that failed.
    """
    folders = {study.name: results.expanduser().absolute() / study.name for study, _ in studies}
    if len(folders) < len(studies):
        raise UserError(f"studies {', '.join(s.name for s, _ in studies)}: give each name once, as it names a folder")
    cells = [_resolved(cell, folders[study.name], runner) for study, own in studies for cell in own]
    with runner.started(cells):
        with _writable(results):
            for cell in cells:
                if run_folder(cell.config, cell.mode).exists():
                    Run(cell.config, cell.mode)  # raises if the folder holds another configuration
            for study, _ in studies:
                folders[study.name].mkdir(parents=True, exist_ok=True)
                with atomic_write(folders[study.name] / STORED) as file:
                    file.write(study.toml.encode())
        return _run_all(cells, runner, rerun, console)


def fail_if_any(failed: Sequence[str], cells: int) -> None:
    """Raise RunFailed with the names of the cells that `failed`."""
    if failed:
        raise RunFailed(f"{len(failed)} of {cells} cells failed: {', '.join(failed)}")


def _resolved(cell: Cell, folder: Path, runner: Runner) -> Cell:
    """`cell` with its actual device and threads, recorded in `folder`; raises UserError if it cannot run."""
    try:
        config = cell.config.changed({"results-dir": str(folder)})
        config, _ = resolve_run(config, cell.mode, runner.engine, runner.here)
        check(config if runner.here else config.changed({"device": "cpu"}), cell.mode)
    except UserError as error:
        raise UserError(f"{folder.name}/{cell.config.name}: {error}") from error
    return cell._replace(config=config)


@contextlib.contextmanager
def _writable(results: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"results-dir = {results} cannot be written ({error.strerror}): give another --results-dir"
        ) from error


def _run_all(cells: Sequence[Cell], runner: Runner, rerun: bool, console: Console) -> list[str]:
    """Run `cells`, and last those that other processes were running; returns the names of those that failed."""
    failed: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        overall = progress.add_task("cells", total=len(cells))
        patience = 0.0
        while cells:
            busy = []
            for cell, failure in runner.run(cells, rerun, patience, progress):
                if isinstance(failure, RunInProgress):
                    busy.append(cell)
                    continue
                if failure:
                    failed.append(_label(cell))
                    progress.console.print(f"{_label(cell)} failed: {failure}", style="red", **PLAIN)
                progress.advance(overall)
            if busy:
                progress.console.print(f"waiting for other processes to run {', '.join(map(_label, busy))}", **PLAIN)
            cells, patience = busy, math.inf
    return failed


def _label(cell: Cell) -> str:
    return f"{Path(cell.config.results_dir).name}/{cell.config.name}"


def _last_round(cell: Cell) -> int:
    if cell.mode == "centralized":
        return whole_epochs(cell.config)[1]
    return run_plan(cell.config, training_images(cell.config)).last_round


def _advance(progress: Progress, task: TaskID) -> Callable[[Row], None]:
    return lambda row: progress.update(task, completed=row["round"])
