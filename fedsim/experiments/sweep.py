"""Run the cells of studies: check all of them first, skip finished ones, report failed ones."""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Column

from fedsim.config import Engine
from fedsim.config.options import SweepOptions
from fedsim.data.metric import metric_of
from fedsim.data.partition import images_of_epoch
from fedsim.errors import RunFailed, RunInProgress, UserError
from fedsim.experiments.execute import check, execute, resolve_run
from fedsim.experiments.progress import each, ends_after, status
from fedsim.experiments.study import STORED, Cell, Study
from fedsim.experiments.track import check_tracker, tracker
from fedsim.federation.lengthen import open_run
from fedsim.runs.folder import writable
from fedsim.runs.records import read_summary
from fedsim.runs.run import OnRow
from fedsim.system.files import atomic_write, read_file

if TYPE_CHECKING:
    from fedsim.experiments.ray_sweep import OnRay

PLAIN: Any = {"soft_wrap": True, "highlight": False, "markup": False}  # for Console.print: print the line unchanged
Failure = RunFailed | UserError | None  # why a cell failed, or None
Outcome = tuple[Cell, Failure]


@dataclass(frozen=True)
class OneByOne:
    """Runs cells in this process, one after the other, and sends their rows to the tracker `track`, if any.

    `on_row` gets them too, with the name of the cell's run as ``run``.
    """

    engine: Engine
    track: str = ""
    on_row: OnRow | None = None
    here = True  # the cells run on this machine, which must have their devices

    def started(self, cells: Sequence[Cell]) -> AbstractContextManager[None]:
        """Context manager, within which `cells` can be run."""
        return contextlib.nullcontext()

    def run(self, cells: Sequence[Cell], rerun: bool, patience: float, progress: Progress) -> Iterator[Outcome]:
        """Run `cells`, even finished ones if `rerun`; yields the outcome of each cell when it ends.

        A cell that another process is still running after `patience` seconds has the outcome RunInProgress.
        """
        for cell in cells:
            rounds, epochs = ends_after(cell.config, cell.mode)
            task = progress.add_task(cell.config.name, total=rounds, status="starting")
            failure: Failure = None
            try:
                config, engine = resolve_run(cell.config, cell.mode, self.engine)
                with tracker(self.track, cell.folder, config, cell.mode) as track:
                    shown = _advance(progress, task, images_of_epoch(config, cell.mode), epochs)
                    own = [_named(cell.config.name, self.on_row)] if self.on_row else []
                    execute(config, cell.mode, engine, each(shown, track, *own), rerun, patience)
            except (RunFailed, UserError) as error:
                failure = error
            finally:
                progress.remove_task(task)
            yield cell, failure


def _named(run: str, on_row: OnRow) -> OnRow:
    """`on_row` with the name of the run in each row."""
    return lambda row: on_row({"run": run, **row})


Runner: TypeAlias = "OneByOne | OnRay"


def runner_of(options: SweepOptions, on_row: OnRow | None = None) -> Runner:
    """The runner of the cells: Ray if that is asked for, otherwise this process, one cell after the other."""
    if on_row and (options.engine == "flower" or options.ray is not None):
        raise UserError("on_row with Ray: its rows are written by other processes: leave out on_row, engine or ray")
    cpus, gpus = options.cpus_per_cell, options.gpus_per_cell
    check_tracker(options.track, options.engine)
    if options.ray is None:
        for flag, share in (("cpus-per-cell", cpus), ("gpus-per-cell", gpus)):
            if share is not None:
                raise UserError(f"{flag} = {share} is a share of a Ray node: give --ray too")
        return OneByOne(options.engine, options.track, on_row)
    if options.engine == "flower":
        raise UserError("engine = flower with --ray: clients would wait for the cores of their cell: leave one out")
    if cpus is not None and not (cpus > 0 and (cpus < 1 or cpus.is_integer())):
        raise UserError(
            f"cpus-per-cell = {cpus} is not a number of cores: give 1, 2, ... or less than 1, for instance 0.5"
        )
    if gpus is not None and not 0 < gpus <= 1:
        raise UserError(f"gpus-per-cell = {gpus} is not a share of a GPU: give above 0 and at most 1, e.g. 0.25")
    from fedsim.experiments.ray_sweep import OnRay

    return OnRay(options.engine, options.ray, cpus, gpus, options.track)


def run_studies(
    studies: Sequence[tuple[Study, Sequence[Cell]]], results: Path, runner: Runner, rerun: bool, console: Console
) -> list[str]:
    """Check the given cells of all studies, then run them in ``RESULTS/STUDY``; `results` is absolute.

    If a cell fails, the others still run. Returns the names of the cells that failed.
    """
    cells = checked_cells(studies, results, runner)
    with runner.started(cells):
        with writable(results):
            for study, _ in studies:
                (folder := results / study.name).mkdir(parents=True, exist_ok=True)
                _store(folder / STORED, study.toml.encode())
        return run_cells(cells, runner, rerun, console)


def _store(path: Path, content: bytes) -> None:
    """Write a file, unless it has this content: where all runs are finished, the disk may be read-only."""
    if not path.exists() or read_file(path) != content:
        with atomic_write(path) as file:
            file.write(content)


def checked_cells(studies: Sequence[tuple[Study, Sequence[Cell]]], results: Path, runner: Runner) -> list[Cell]:
    """The given cells of all studies, resolved; raises UserError if one cannot run, or its folder holds another run."""
    if len({study.name for study, _ in studies}) < len(studies):
        raise UserError(f"studies {', '.join(s.name for s, _ in studies)}: give each name once, as it names a folder")
    cells = [resolved_cell(cell, results / study.name, runner) for study, own in studies for cell in own]
    check_folders(cells, results)
    return cells


def check_folders(cells: Sequence[Cell], results: Path) -> None:
    """Raise UserError if the folder of one of `cells` (resolved) in `results` holds another configuration."""
    with writable(results):
        for cell in cells:
            if cell.folder.exists():
                open_run(cell.config, cell.mode)


def fail_if_any(failed: Sequence[str], cells: int) -> None:
    """Raise RunFailed with the names in `failed`, if there are any; `cells` is the number of all cells."""
    if failed:
        raise RunFailed(f"{len(failed)} of {cells} cells failed: {', '.join(failed)}")


def resolved_cell(cell: Cell, folder: Path, runner: Runner) -> Cell:
    """`cell` with its actual device and threads, recorded in `folder`; raises UserError if it cannot run."""
    try:
        config = cell.config.changed({"results-dir": str(folder)})
        config, engine = resolve_run(config, cell.mode, runner.engine, runner.here)
        here = config if runner.here else config.changed({"device": "cpu"})
        check(here, cell.mode, engine)
    except UserError as error:
        raise UserError(f"{folder.name}/{cell.config.name}: {error}") from error
    return cell._replace(config=config)


def check_writable(folder: Path, results: Path) -> None:
    """Raise UserError if `folder` in `results` (absolute), or the nearest one above it that exists, is not writable."""
    with writable(results):
        existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def run_cells(cells: Sequence[Cell], runner: Runner, rerun: bool, console: Console) -> list[str]:
    """Run `cells`; returns the names of those that failed. Cells that another process is running come last.

    Each cell gets a line when it ends; in a terminal each running cell has a line below.
    """
    failed: list[str] = []
    name = f"{{task.description:.{max(12, console.width - 42)}}}"  # what follows fits, up to the time left
    line = TextColumn(
        f"{{task.completed}}/{{task.total}}  {name}  {{task.fields[status]}}",
        table_column=Column(no_wrap=True, overflow="ellipsis"),
    )
    with Progress(SpinnerColumn(), line, console=console, disable=not console.is_terminal) as progress:
        overall = progress.add_task("cells", total=len(cells), status="")
        patience, done, total = 0.0, 0, len(cells)
        while cells:
            busy = []
            for cell, failure in runner.run(cells, rerun, patience, progress):
                if isinstance(failure, RunInProgress):
                    busy.append(cell)
                    continue
                done += 1
                if failure:
                    failed.append(full_name(cell))
                    console.print(f"{full_name(cell)} failed: {failure}", style="red", **PLAIN)
                else:
                    console.print(f"{done}/{total}  {full_name(cell)}  {_outcome(cell)}", **PLAIN)
                progress.advance(overall)
            if busy:
                console.print(f"waiting for other processes to run {', '.join(map(full_name, busy))}", **PLAIN)
            cells, patience = busy, math.inf
    return failed


def full_name(cell: Cell) -> str:
    """The name of a cell, with that of its study's folder."""
    return f"{Path(cell.config.results_dir).name}/{cell.config.name}"


def _outcome(cell: Cell) -> str:
    """The last accuracy of a cell that has ended, and its time."""
    summary = read_summary(cell.folder)
    if summary is None or (final := summary[metric_of(summary).final]) is None:
        return "stopped"
    state = "" if summary["finished"] else "stopped at "
    return f"{state}{summary['tested_on']} {metric_of(summary).told(final)}  {summary['seconds']:.1f} s"


def _advance(progress: Progress, task: TaskID, images: int, epochs: float) -> OnRow:
    return lambda row: progress.update(task, completed=row["round"], status=status(row, images, epochs))
