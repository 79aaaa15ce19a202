"""The commands: what each does with its options (`fedsim.config.options`) and keys."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import get_completion_class
from rich.console import Console

from fedsim import __version__
from fedsim.cli.flags import CommandGroup, several
from fedsim.config import Config, Engine, Mode
from fedsim.config.options import (
    BenchOptions,
    CentralizedOptions,
    CompareOptions,
    DemoOptions,
    DeployOptions,
    DiffOptions,
    ExportOptions,
    GridOptions,
    ListOptions,
    LocalSGDOptions,
    PartitionOptions,
    ReportOptions,
    ResultsOptions,
    StudyOptions,
    SweepOptions,
    TimeOptions,
)
from fedsim.errors import UserError
from fedsim.system.interrupts import resumable

if TYPE_CHECKING:  # these import torch, which takes seconds; --help must not wait for it
    from fedsim.experiments.study import Cell, Study
    from fedsim.experiments.sweep import Runner
    from fedsim.runs.records import Row

GRID_STEPS = (10, 20, 30)  # the J of a grid
SHELLS = ("bash", "zsh", "fish")


def _show_completion(context: click.Context, parameter: click.Parameter, shell: str | None) -> None:
    if shell and (completion := get_completion_class(shell)):
        print(completion(cli, {}, "fedsim", "_FEDSIM_COMPLETE").source())
        context.exit()


@click.group(cls=CommandGroup)
@click.version_option(__version__, message="fedsim %(version)s", help="Print the version.")
@click.option(
    "--show-completion",
    type=click.Choice(SHELLS),
    is_eager=True,
    expose_value=False,
    callback=_show_completion,
    help="Print the completion for a shell, to be added to its start-up file.",
)
def cli() -> None:
    """LocalSGD and its large-batch rivals: how often must machines that train together talk?"""


@cli.of(CentralizedOptions)
def centralized(options: CentralizedOptions, keys: dict[str, Any]) -> None:
    """Train on one machine that has all images: the large-batch baselines."""
    _run(options, keys, "local")


@cli.of(LocalSGDOptions)
def localsgd(options: LocalSGDOptions, keys: dict[str, Any]) -> None:
    """Train by LocalSGD: K clients, J local steps per round, then one average."""
    _run(options, keys, options.engine)


def _run(options: CentralizedOptions, keys: dict[str, Any], engine: Engine) -> None:
    from fedsim.experiments.execute import configured_run, execute_checked

    mode = options.keys.mode
    config, chosen = configured_run(mode, keys, options.preset, engine)
    if options.dry_run:
        _print_cost(config, mode, chosen, options.track)
        return
    told = _reported(config, mode, chosen, options.track)
    with resumable(lambda: _how_to_resume(config, mode, options.rerun)), told as on_row:
        execute_checked(config, mode, chosen, on_row, options.rerun)


def _how_to_resume(config: Config, mode: Mode, rerun: bool) -> str:
    from fedsim.runs.folder import has_checkpoint, run_folder

    if not has_checkpoint(run_folder(config, mode)):
        return "there is no checkpoint yet: the same command starts again"
    return f"run the same command again{' without --rerun' if rerun else ''} to resume from the last checkpoint"


@cli.of(GridOptions)
def grid(options: GridOptions, keys: dict[str, Any]) -> None:
    """Run every cell of a K/J grid, then show its table and write CSV and PNG.

    Any other key may have several values too, as in --lr 0.01,0.1 or --error-feedback true,false: the grid then
    has a cell for each combination of values.
    """
    from fedsim.experiments.study import configure, grid_study

    values = {name: several(name, value) for name, value in keys.items()}
    crossed = {name: listed for name, listed in values.items() if listed}
    single = {name: value for name, value in keys.items() if name not in crossed}
    local_steps = options.local_steps
    if local_steps is None:
        by_epochs = "local-epochs" in crossed or configure("localsgd", single, options.preset).local_epochs
        local_steps = () if by_epochs else GRID_STEPS
    of_steps = {"local-steps": local_steps} if local_steps else {}
    lists = {"clients": options.clients, **of_steps, "seed": options.seeds, **crossed}
    found = grid_study(lists, single, options.preset)
    _run_studies([found], lambda study: study.cells(keys=single), options, save_as="grid")


@cli.of(DemoOptions)
def demo(options: DemoOptions) -> None:
    """A small K/J grid on synthetic images: offline, about a minute and a half on two cores."""
    from fedsim.experiments.study import Study, read_study

    sweep = SweepOptions(results_dir=options.results_dir, rerun=options.rerun)
    _run_studies([read_study("demo")], Study.cells, sweep, save_as="grid")


@cli.of(BenchOptions)
def bench(options: BenchOptions, keys: dict[str, Any]) -> None:
    """Measure the time of a round for each variant of LocalSGD, against centralized training at batch K * B."""
    from fedsim.bench.measure import run_bench

    run_bench(keys, options, _console())


@cli.of(StudyOptions)
def study(options: StudyOptions, keys: dict[str, Any]) -> None:
    """Run the given studies, then show their tables; without any, list all studies and their costs."""
    from fedsim.experiments.study import read_study, select

    if not options.studies:
        from fedsim.experiments.cost import KEPT, Pace, list_studies

        for name in ("also", "cells", "precision"):
            if getattr(options, name):
                raise UserError(f"{name} is of the studies that run: name one, for instance kj-small")
        for line in list_studies(options.seeds, Pace(_absolute(options.results_dir), KEPT)):
            print(line, flush=True)  # each takes a part of a second
        return
    read = [read_study(name).with_also(options.also) for name in options.studies]
    if options.precision:
        read = [study.in_precision(options.precision) for study in read]
    _run_studies(read, lambda study: select(study, study.cells(options.seeds, keys), options.cells), options)


def _run_studies(
    studies: Sequence[Study], cells_of: Callable[[Study], list[Cell]], options: SweepOptions, save_as: str = ""
) -> None:
    """Run the cells that `cells_of` selects of each study, then show the tables; with `save_as`, also save them."""
    from fedsim.experiments.sweep import PLAIN, check_writable, fail_if_any, runner_of
    from fedsim.experiments.tune import run_tuned_studies, with_stored_choice
    from fedsim.system.provenance import program

    console, results, runner = _console(), _absolute(options.results_dir), runner_of(options)
    if options.dry_run:
        for study in (with_stored_choice(study, results) for study in studies):
            check_writable(results / study.name, results)
            _show_plan(study, cells_of(study), results, runner)
        return
    again = f"run the same command again{' without --rerun' if options.rerun else ''}"
    with resumable(lambda: f"{again} to run what is left"):
        failed, total = run_tuned_studies(studies, cells_of, results, runner, options.rerun, console)
    from fedsim.report.page import show_results  # slow to import, so the runs begin first

    for folder in (results / study.name for study in studies):
        show_results(folder, console, save_as)
        console.print(f"{program()} report {folder} -o report", **PLAIN)
    fail_if_any(failed, total)


def _show_plan(study: Study, cells: Sequence[Cell], results: Path, runner: Runner) -> None:
    """Print the cost of the `cells` of `study`, and of the trials of its tuning."""
    from fedsim.experiments.cost import KEPT, Pace, plan_lines
    from fedsim.experiments.sweep import resolved_cell
    from fedsim.experiments.tune import resolved_trials

    pace = Pace(results, KEPT)
    if trials := resolved_trials(study, cells, results, runner):
        lines = plan_lines([trial.cell for trial in trials], pace)
        print(f"{study.name}, trials (if none is stopped early):", *lines, sep="\n")
    print(
        f"{study.name}:", *plan_lines([resolved_cell(c, results / study.name, runner) for c in cells], pace), sep="\n"
    )


@cli.of(ResultsOptions)
def watch(options: ResultsOptions) -> None:
    """Show the progress of all runs in a folder: in a terminal until none is in progress, in a pipe once."""
    from fedsim.experiments.watch import watch

    watch(_absolute(options.results), _console())


@cli.of(ExportOptions)
def export_shards(options: ExportOptions, keys: dict[str, Any]) -> None:
    """Write the images of each client to a folder, for SuperNodes that have only their own data.

    Each folder holds a shard of the run with the same keys, as images.npy and labels.npy: give it to its node as
    data-dir.
    """
    from fedsim.data.local_folder import write_shards
    from fedsim.experiments.study import configure

    config = configure("localsgd", {**keys, "device": "cpu", "batch-size": 1})  # the shards depend on neither
    write_shards(config, Path(options.out))
    print(f"{config.clients} shards in {Path(options.out)}")


@cli.of(PartitionOptions)
def partition(options: PartitionOptions, keys: dict[str, Any]) -> None:
    """Show how many images of each class every client holds, in a run with the same keys."""
    from fedsim.experiments.study import configure
    from fedsim.report.partition import show_partition

    config = configure("localsgd", {**keys, "device": "cpu", "partition.small-shards": True})
    show_partition(config, options.out, _console())


@cli.of(ReportOptions)
def report(options: ReportOptions) -> None:
    """Make an HTML page, a Markdown file, figures (PNG, SVG) and CSV files from a folder of results."""
    from fedsim.report.page import build_report

    build_report(options.results, options.out, options.figure, _console())


@cli.of(CompareOptions)
def compare(options: CompareOptions) -> None:
    """Show several studies in one table and one figure, with paired differences over equal seeds."""
    from fedsim.report.compare import compare

    compare(options.folders, options.out, _console())


@cli.of(DiffOptions)
def diff(options: DiffOptions) -> None:
    """Show the keys in which two runs differ."""
    from fedsim.report.compare import show_differences

    show_differences(options.one, options.other, _console())


@cli.of(ResultsOptions)
def runs(options: ResultsOptions) -> None:
    """List all runs in a folder: state, date, host, device, best and final metric, bytes, time."""
    from fedsim.report.compare import show_runs

    show_runs(options.results, _console())


@cli.of(ListOptions, name="list")
def list_choices(options: ListOptions) -> None:
    """Show what a key may choose, with the arguments of each name, their ranges and defaults; or all such keys."""
    from fedsim.cli.listing import listed

    print(*listed(options.key, options.name), sep="\n")


@cli.of(ResultsOptions)
def migrate(options: ResultsOptions) -> None:
    """Rewrite the keys in a folder of results of an earlier version; no number changes."""
    from fedsim.experiments.migrate import migrate

    changed = migrate(_absolute(options.results))
    print(*changed, f"{len(changed)} files and folders were changed", sep="\n")


@cli.of(TimeOptions, torch=False)
def time_to_accuracy(options: TimeOptions) -> None:
    """Estimate the time to a target accuracy on a network, for each cell in a folder of results.

    seconds = steps of the slowest worker * compute + syncs * messages * latency + bytes on a link / bandwidth, at the
    first test that reaches the target. With --link worker and server a sync is a message up and one down, and a link
    carries the bytes of one worker or of all; with all-reduce they go round a ring of the workers. The large-batch
    baseline counts as data-parallel SGD: a sync at every step, of 4 bytes per parameter, worker and direction. One
    worker (K = 1) sends nothing. A round waits for the slowest of its workers: see --jitter and --slow. With delay = 1
    it takes the longer of computing and messages instead of their sum. Compute time is the median over the runs of
    seconds per training image, tests included, times the images of a worker's step. A figure shows the time at
    bandwidths from 1 Mbit/s to 100 Gbit/s, and the fastest cells.
    """
    from fedsim.report.time_to_accuracy import plan_of, time_to_accuracy
    from fedsim.system.provenance import program

    command = f"{program()} {shlex.join(sys.argv[1:])}"
    time_to_accuracy(options.results, plan_of(options), options.out, command, _console())


@cli.of(DeployOptions, torch=False)
def deploy(options: DeployOptions) -> None:
    """Write the files of a Flower deployment: keys, certificates, scripts, systemd units and settings."""
    from fedsim.deploy.files import Federation
    from fedsim.deploy.files import deploy as write

    federation = Federation(options.nodes, options.host, options.port, options.name, options.insecure)
    out = options.out
    write(federation, Path(out), Path(options.ca) if options.ca else None)
    print(f"{out}: superlink/ is for the server, nodes/0/ ... for a machine each, client/ for the user of flwr run;")
    print(
        "the next steps are in docs/deployment.md" + ("" if options.insecure else "; ca/ stays here, ca.key is secret")
    )


def _console() -> Console:
    """A console that does not interpret brackets and colons in names and paths."""
    return Console(markup=False, emoji=False)


def _absolute(folder: str) -> Path:
    return Path(folder).expanduser().absolute()


def _print_cost(config: Config, mode: Mode, engine: Engine, track: str) -> None:
    """Print what a run would cost."""
    from fedsim.experiments.cost import KEPT, Pace, plan_lines
    from fedsim.experiments.study import Cell
    from fedsim.runs.folder import run_folder

    _check_run(config, mode, engine, track)
    folder = run_folder(config, mode)
    print(*plan_lines([Cell((), mode, config.changed({"name": folder.name}))], Pace(folder.parent, KEPT)), sep="\n")


def _check_run(config: Config, mode: Mode, engine: Engine, track: str) -> None:
    """Raise UserError if a run of `config` (resolved) cannot begin, without writing anything."""
    from fedsim.experiments.execute import check
    from fedsim.experiments.sweep import check_writable
    from fedsim.experiments.track import check_tracker
    from fedsim.federation.lengthen import open_run
    from fedsim.runs.folder import CONFIG, run_folder

    check_tracker(track, engine)
    check(config, mode, engine)
    folder = run_folder(config, mode)
    begun = (folder / CONFIG).exists()
    if not begun or not open_run(config, mode, engine=engine if mode == "localsgd" else "").finished:
        check_writable(folder, folder.parent)


@contextlib.contextmanager
def _reported(config: Config, mode: Mode, engine: Engine, track: str) -> Iterator[Callable[[Row], None]]:
    """Context manager: check a run, print its folder, then its result; yields what shows and tracks a row."""
    from fedsim.experiments.progress import each, shown_rows
    from fedsim.experiments.track import tracker
    from fedsim.runs.folder import run_folder
    from fedsim.runs.records import read_summary
    from fedsim.runs.shown import outcome_line, print_row

    _check_run(config, mode, engine, track)  # before the first line
    folder = run_folder(config, mode)
    by = f" by {engine}" if mode == "localsgd" else ""
    rounding = ", equal to local but for rounding," if engine == "stacked" else ""
    print(f"{mode} on {config.device}{by}{rounding} in {folder}", flush=True)
    # The engine flower prints its own log
    shown = contextlib.nullcontext(print_row) if engine == "flower" else shown_rows(config, mode, _console())
    with tracker(track, folder, config, mode) as track_row, shown as show:
        yield each(show, track_row)
    summary = read_summary(folder)
    if summary is None or not summary["finished"]:
        print("stopped early: run the same command without --stop-after-... to resume")
        return
    print(outcome_line(summary))
