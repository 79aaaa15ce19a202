"""The commands. Bad input and failed runs are reported on one line, with an exit code."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Optional, cast, get_args

import click
import typer
from rich.console import Console

from fedsim import __version__
from fedsim.cli.flags import (
    Command,
    CommandGroup,
    GridCommand,
    RayCommand,
    TorchCommand,
    given,
    integers,
    keys_of,
    several,
)
from fedsim.config import Config, Engine, Mode, engine_named, typed
from fedsim.errors import RunFailed, UserError
from fedsim.spellings import now
from fedsim.system.interrupts import Interrupted, interruption

if TYPE_CHECKING:  # these import torch, which takes seconds; --help must not wait for it
    from fedsim.experiments.study import Cell, Study
    from fedsim.experiments.sweep import Runner
    from fedsim.runs.records import Row

SHARD_KEYS = (  # on which alone the images of the clients depend
    *("dataset", "data-dir", "validation", "clients", "seed", "partition"),
)

GRID_STEPS = "10,20,30"  # the J of a grid

# Without rich, which truncates flags and help that do not fit its columns
cli = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    suggest_commands=False,  # click does
)


def main() -> None:
    """Run the command in ``sys.argv``; exit with 2 on bad input, 1 on a failed run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # paths may have characters that the terminal lacks
    with _saying_how_to_resume(), _errors_in_one_line():
        # A shell completes the command that is installed, also where its script is shown by another name
        code = cli(prog_name="fedsim", standalone_mode=False)  # the code of typer.Exit, which this mode returns
    if isinstance(code, int):
        sys.exit(code)


@contextlib.contextmanager
def _saying_how_to_resume() -> Iterator[None]:
    """Context manager: say how to resume, if the command can be resumed, where it ends by a signal or a closed pipe.

    `Interrupted` has it as a note.
    """
    flag = " without --rerun" if "--rerun" in sys.argv else ""
    how = f"run the same command again{flag} to resume from the last checkpoint"
    try:
        yield
    except Interrupted as interrupted:
        if _resumes(sys.argv[1:]):
            interrupted.add_note(how)
        raise
    except SystemExit as ended:  # by click, where nobody reads what is printed any more
        if isinstance(ended.__context__, BrokenPipeError) and _resumes(sys.argv[1:]):
            print(f"error: standard output was closed by whoever read it: {how}", file=sys.stderr)
        raise


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Context manager: print an error on one line and exit with its code."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.message)
        sys.exit(2)
    except click.NoSuchOption as error:
        option = error.option_name
        written_now = now(option.removeprefix("--").removeprefix("no-"))
        _fail(f"{option} is written {written_now} now" if written_now else error.format_message(), 2)
    except click.UsageError as error:
        _fail(error.format_message(), 2)
    except (UserError, RunFailed) as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2)
    except MemoryError:
        _fail("out of memory: give a smaller --batch-size, --local-steps or data set", 1)


def _resumes(arguments: list[str]) -> bool:
    """Whether the command can be resumed, which those with a flag --rerun can."""
    command = typer.main.get_group(cli).commands.get(next(iter(arguments), ""))
    return command is not None and any(parameter.name == "rerun" for parameter in command.params)


def _fail(message: str, code: int) -> NoReturn:
    """Print the message on one line, with control characters escaped, and exit."""
    if interrupted := interruption(sys.exception()):
        raise interrupted
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    print(f"error: {line}", file=sys.stderr)
    sys.exit(code)


def _console() -> Console:
    """A console that does not interpret brackets and colons in names and paths."""
    return Console(markup=False, emoji=False)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"fedsim {__version__}")
        raise typer.Exit


@cli.callback()
def fedsim(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """LocalSGD and its large-batch rivals: how often must machines that train together talk?"""


PRESET = typer.Option(
    "",
    "--preset",
    "--config",
    help="use the [set] and [[case]] of this study, a name or TOML file, not its [grid] or [tune]; flags override them",
    metavar="NAME",
)
DRY_RUN = typer.Option(False, "--dry-run", help="list the runs and what they would cost; write nothing")
TRACK = typer.Option("", "--track", help="also send the rows to: tensorboard, or package.module:Class", metavar="NAME")
RERUN = typer.Option(False, "--rerun", help="start over, even if a run is finished or was interrupted")
ENGINE = typer.Option(
    "local",
    "--engine",
    help="local or stacked: in this process, stacked equal to rounding; flower: on Ray",
    metavar="NAME",
)
RAY = typer.Option(
    None,
    "--ray",
    help="run the cells in parallel on the Ray cluster at ADDRESS (host:port, or auto); without ADDRESS, on that of "
    "RAY_ADDRESS or on a Ray started on this machine. For GPUs that this machine lacks, give --device cuda",
    metavar="[ADDRESS]",
)
CPUS = typer.Option(None, "--cpus-per-cell", help="with --ray: CPU cores per cell (default: --threads)")
GPUS = typer.Option(None, "--gpus-per-cell", help="with --ray: share of a GPU per cell, e.g. 0.25 (default: 1)")
RESULTS_DIR = typer.Option("results", "--results-dir", help="folder in which each study has its own", metavar="TEXT")
RESULTS = typer.Argument("results", help="folder of results, or of one study", metavar="[RESULTS]")
OUT = typer.Option("report", "-o", "--out", help="folder to write to", metavar="FOLDER")
STUDIES = typer.Argument(None, metavar="[STUDY]...", help="names of studies in fedsim/studies/, or TOML files")


@cli.command(cls=TorchCommand)
@keys_of("centralized")
def centralized(
    preset: str = PRESET, rerun: bool = RERUN, dry_run: bool = DRY_RUN, track: str = TRACK, **keys: Any
) -> None:
    """Train on one machine that has all images: the large-batch baselines."""
    from fedsim.experiments.execute import configured_run, execute_checked

    config, engine = configured_run("centralized", given(keys), preset)
    if dry_run:
        _print_cost(config, "centralized", engine, track)
        return
    with _reported(config, "centralized", engine, track) as on_row:
        execute_checked(config, "centralized", engine, on_row, rerun)


@cli.command(cls=TorchCommand)
@keys_of("localsgd")
def localsgd(
    preset: str = PRESET,
    rerun: bool = RERUN,
    engine: str = ENGINE,
    dry_run: bool = DRY_RUN,
    track: str = TRACK,
    **keys: Any,
) -> None:
    """Train by LocalSGD: K clients, J local steps per round, then one average."""
    from fedsim.experiments.execute import configured_run, execute_checked

    config, chosen = configured_run("localsgd", given(keys), preset, engine)
    if dry_run:
        _print_cost(config, "localsgd", chosen, track)
        return
    with _reported(config, "localsgd", chosen, track) as on_row:
        execute_checked(config, "localsgd", chosen, on_row, rerun)


@cli.command(cls=GridCommand)
@keys_of("localsgd", without=("clients", "local-steps", "seed", "results-dir", "resume"), lists=True)
def grid(
    clients: str = typer.Option("4,12", "--clients", help="the values of K, with commas", metavar="LIST"),
    local_steps: Optional[str] = typer.Option(
        None,
        "--local-steps",
        help=f"the values of J, with commas (default: {GRID_STEPS}; with --local-epochs: none)",
        metavar="LIST",
    ),
    seeds: str = typer.Option("2025", "--seeds", help="the seeds of each cell, with commas", metavar="LIST"),
    results_dir: str = RESULTS_DIR,
    preset: str = PRESET,
    rerun: bool = RERUN,
    engine: str = ENGINE,
    ray: Optional[str] = RAY,
    cpus_per_cell: Optional[float] = CPUS,
    gpus_per_cell: Optional[float] = GPUS,
    dry_run: bool = DRY_RUN,
    track: str = TRACK,
    **keys: Any,
) -> None:
    """Run every cell of a K/J grid, then show its table and write it as CSV and PNG.

    Any other key may have several values too, as in --lr 0.01,0.1 or --error-feedback true,false: the grid then
    has a cell for each combination of values.
    """
    from fedsim.experiments.study import configure, grid_study

    values = {name: several(name, value) for name, value in given(keys).items()}
    crossed = {name: listed for name, listed in values.items() if listed}
    single = {name: value for name, value in given(keys).items() if name not in crossed}
    if local_steps is None:
        by_epochs = "local-epochs" in crossed or configure("localsgd", single, preset).local_epochs
        local_steps = None if by_epochs else GRID_STEPS
    of_steps = {"local-steps": integers("local-steps", local_steps)} if local_steps is not None else {}
    lists = {"clients": integers("clients", clients), **of_steps, "seed": integers("seeds", seeds), **crossed}
    runner = _runner(ray, cpus_per_cell, gpus_per_cell, engine, track)
    found = grid_study(lists, single, preset)
    _run_studies([found], lambda study: study.cells(keys=single), results_dir, runner, rerun, dry_run, save_as="grid")


@cli.command(cls=TorchCommand)
def demo(results_dir: str = RESULTS_DIR, rerun: bool = RERUN) -> None:
    """A small K/J grid on synthetic images: offline, two cores, about a minute."""
    from fedsim.experiments.study import Study, read_study
    from fedsim.experiments.sweep import OneByOne

    _run_studies([read_study("demo")], Study.cells, results_dir, OneByOne("local"), rerun, save_as="grid")


@cli.command(cls=TorchCommand)
@keys_of("localsgd", without=("clients", "dataset", "results-dir", "name", "resume"))
def bench(
    clients: str = typer.Option("1,4,12,64", "--clients", help="the K to measure, with commas", metavar="LIST"),
    variants: str = typer.Option(
        "", "--variants", help="what to measure, with commas (default: all for the device)", metavar="LIST"
    ),
    timed: int = typer.Option(3, "--timed", help="timed rounds in each pass", min=1),
    passes: int = typer.Option(2, "--passes", help="how often each variant is measured", min=1),
    time_limit: float = typer.Option(900, "--time-limit", help="seconds after which a measurement is stopped", min=1),
    grow: bool = typer.Option(True, help="also measure how the time of a round grows with K (to 1,000) and J"),
    out: str = typer.Option("results/bench.json", "-o", "--out", help="the file to write", metavar="FILE"),
    **keys: Any,
) -> None:
    """Measure the time of a round for each variant of LocalSGD, against centralized training at batch K * B."""
    from fedsim.bench.measure import run_bench

    sizes = integers("clients", clients)
    names = [name.strip() for name in variants.split(",")] if variants else []
    run_bench(given(keys), sizes, names, timed, passes, time_limit, grow, out, _console())


@cli.command(cls=RayCommand)
def study(
    studies: list[str] = STUDIES,
    seeds: str = typer.Option("", "--seeds", help="seeds of every cell, with commas (default: the study's)"),
    cells: str = typer.Option("", "--cells", help="run only these cells, with commas: 'k12-j20,k4-*' (default: all)"),
    results_dir: str = RESULTS_DIR,
    data_dir: Optional[str] = typer.Option(None, "--data-dir", help="as for localsgd", metavar="TEXT"),
    device: Optional[str] = typer.Option(None, "--device", help="as for localsgd", metavar="TEXT"),
    threads: Optional[str] = typer.Option(None, "--threads", help="as for localsgd", metavar="INTEGER"),
    stop_after_epochs: Optional[str] = typer.Option(
        None, "--stop-after-epochs", help="as for localsgd", metavar="NUMBER"
    ),
    accept_changed_code: bool = typer.Option(False, "--accept-changed-code", help="as for localsgd"),
    precision: str = typer.Option(
        "", "--precision", help="run each study in this precision, as STUDY-PRECISION", metavar="TEXT"
    ),
    rerun: bool = RERUN,
    engine: str = ENGINE,
    ray: Optional[str] = RAY,
    cpus_per_cell: Optional[float] = CPUS,
    gpus_per_cell: Optional[float] = GPUS,
    dry_run: bool = DRY_RUN,
    track: str = TRACK,
) -> None:
    """Run the given studies, then show their tables; without any, list all studies and their costs."""
    from fedsim.experiments.study import read_study, select

    chosen = integers("seeds", seeds) if seeds else []
    if not studies:
        from fedsim.experiments.cost import list_studies

        print(*list_studies(chosen, _results(results_dir)), sep="\n")
        return
    flags = {"data-dir": data_dir, "device": device, "threads": threads, "stop-after-epochs": stop_after_epochs}
    keys = given({**flags, "accept-changed-code": accept_changed_code or None})
    only = [pattern.strip() for pattern in cells.split(",") if pattern.strip()]
    read = [read_study(name).in_precision(precision) if precision else read_study(name) for name in studies]
    runner = _runner(ray, cpus_per_cell, gpus_per_cell, engine, track)
    _run_studies(
        read, lambda study: select(study, study.cells(chosen, keys), only), results_dir, runner, rerun, dry_run
    )


def _run_studies(
    studies: Sequence[Study],
    cells_of: Callable[[Study], list[Cell]],
    results_dir: str,
    runner: Runner,
    rerun: bool,
    dry_run: bool = False,
    save_as: str = "",
) -> None:
    """Run the cells that `cells_of` selects of each study, then show the tables; with `save_as`, also save them."""
    from fedsim.experiments.sweep import PLAIN, check_writable, fail_if_any
    from fedsim.experiments.tune import run_tuned_studies, with_stored_choice
    from fedsim.system.provenance import program

    console, results = _console(), _results(results_dir)
    if dry_run:
        for study in (with_stored_choice(study, results) for study in studies):
            check_writable(results / study.name, results)
            _show_plan(study, cells_of(study), results, runner)
        return
    failed, total = run_tuned_studies(studies, cells_of, results, runner, rerun, console)
    from fedsim.report.page import show_results  # slow to import, so the runs begin first

    for folder in (results / study.name for study in studies):
        show_results(folder, console, save_as)
        console.print(f"{program()} report {folder} -o report", **PLAIN)
    fail_if_any(failed, total)


def _show_plan(study: Study, cells: Sequence[Cell], results: Path, runner: Runner) -> None:
    """Print the cost of the `cells` of `study`, and of the trials of its tuning."""
    from fedsim.experiments.cost import Pace, plan_lines
    from fedsim.experiments.sweep import resolved_cell
    from fedsim.experiments.tune import resolved_trials

    pace = Pace(results)
    if trials := resolved_trials(study, cells, results, runner):
        lines = plan_lines([trial.cell for trial in trials], pace)
        print(f"{study.name}, trials (if none is stopped early):", *lines, sep="\n")
    print(
        f"{study.name}:", *plan_lines([resolved_cell(c, results / study.name, runner) for c in cells], pace), sep="\n"
    )


def _results(folder: str) -> Path:
    """The absolute path of --results-dir; raises UserError as the key results-dir does."""
    return Path(typed("results-dir", folder)).expanduser().absolute()


@cli.command(cls=TorchCommand)
def watch(results: str = RESULTS) -> None:
    """Show the progress of all runs in a folder: in a terminal until none is in progress, in a pipe once."""
    from fedsim.experiments.watch import watch

    watch(_results(results), _console())


@cli.command(cls=TorchCommand)
@keys_of("localsgd", only=SHARD_KEYS)
def export_shards(
    out: str = typer.Option(..., "-o", "--out", help="the folder to create; it will hold a folder for each client"),
    **keys: Any,
) -> None:
    """Write the images of each client to a folder, for SuperNodes that have only their own data.

    Each folder holds a shard of the run with the same keys, as images.npy and labels.npy: give it to its node as
    data-dir.
    """
    from fedsim.data.local_folder import write_shards
    from fedsim.experiments.study import configure

    of_shards = {**given(keys), "device": "cpu", "batch-size": 1}  # the shards depend on neither
    config = configure("localsgd", of_shards)
    write_shards(config, Path(out))
    print(f"{config.clients} shards in {Path(out)}")


@cli.command(cls=TorchCommand)
@keys_of("localsgd", only=SHARD_KEYS)
def partition(
    out: str = typer.Option("", "-o", "--out", help="also plot it to this file, .png, .pdf or .svg", metavar="FILE"),
    **keys: Any,
) -> None:
    """Show how many images of each class every client holds, in a run with the same keys."""
    from fedsim.experiments.study import configure
    from fedsim.report.partition import show_partition

    show_partition(
        configure("localsgd", {**given(keys), "device": "cpu", "partition.small-shards": True}), out, _console()
    )


@cli.command(cls=TorchCommand)
def report(
    results: str = RESULTS,
    out: str = OUT,
    figure: str = typer.Option("", "--figure", help="make only this figure and its CSV", metavar="NAME"),
) -> None:
    """Make an HTML page, a Markdown file, figures (PNG, SVG) and CSV files from a folder of results."""
    from fedsim.report.page import build_report

    build_report(results, out, figure, _console())


@cli.command("list", cls=TorchCommand)
def list_choices(key: str = typer.Argument("", help="a key, for instance compress", metavar="[KEY]")) -> None:
    """Show what a key may choose, with the arguments of each name, their ranges and defaults; or all such keys."""
    from fedsim.cli.listing import listed

    print(*listed(key), sep="\n")


@cli.command(cls=TorchCommand)
def migrate(results: str = RESULTS) -> None:
    """Rewrite the keys in a folder of results of an earlier version; no number changes."""
    from fedsim.experiments.migrate import migrate

    changed = migrate(_results(results))
    print(*changed, f"{len(changed)} files and folders were changed", sep="\n")


@cli.command(cls=Command)
def time_to_accuracy(
    results: str = RESULTS,
    bandwidth: str = typer.Option(..., "--bandwidth", help="of each link, per second: e.g. 100Mbit or 12.5MB"),
    latency: str = typer.Option(..., "--latency", help="of a message, one way: e.g. 20ms"),
    target: float = typer.Option(..., "--target", help="the accuracy to reach, from 0 to 1"),
    upload: str = typer.Option("", "--upload", help="bandwidth to the server (default: that of --bandwidth)"),
    link: str = typer.Option(
        "worker",
        "--link",
        help="worker: a server, each worker has its own link; server: all share the server's; all-reduce: no server",
        metavar="NAME",
    ),
    compute: str = typer.Option("", "--compute", help="time of a worker's local step, e.g. 10ms (default: measured)"),
    jitter: str = typer.Option(
        "",
        "--jitter",
        help="how step times vary: lognormal:SIGMA or exponential (default: not at all)",
        metavar="TEXT",
    ),
    slow: str = typer.Option(
        "",
        "--slow",
        help="slow workers, as COUNT:FACTOR; 1:2.5 is one that takes 2.5 times as long (default: none)",
    ),
    out: str = OUT,
) -> None:
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
    from fedsim.report.network import Link, Network, duration, rate
    from fedsim.report.stragglers import stragglers
    from fedsim.report.time_to_accuracy import Plan, time_to_accuracy
    from fedsim.system.provenance import program

    if link not in get_args(Link):
        raise UserError(f"link = {link!r} is unknown: it must be one of {', '.join(get_args(Link))}")
    up = rate("upload", upload) if upload else 0.0
    network = Network(rate("bandwidth", bandwidth), duration("latency", latency, zero=True), cast(Link, link), up)
    step = duration("compute", compute) if compute else None
    plan = Plan(target, network, step, stragglers(jitter, slow))
    command = f"{program()} {shlex.join(sys.argv[1:])}"
    time_to_accuracy(results, plan, out, command, _console())


@cli.command(cls=Command)
def deploy(
    nodes: int = typer.Option(..., "--nodes", help="number of SuperNodes, one for each client"),
    out: str = typer.Option("federation", "-o", "--out", help="the folder to create", metavar="FOLDER"),
    host: str = typer.Option(
        "127.0.0.1", "--host", help="the SuperLink's DNS names and IP addresses, with commas; nodes use the first"
    ),
    port: int = typer.Option(8000, "--port", help="port of the SuperLink; node I has port + 1 + I on its own machine"),
    name: str = typer.Option("federation", "--name", help="name of the connection: flwr run . NAME", metavar="NAME"),
    ca: str = typer.Option(
        "", "--ca", help="ca/ of an earlier deployment, to sign with (default: create a new certificate authority)"
    ),
    insecure: bool = typer.Option(False, "--insecure", help="use neither TLS nor authentication of nodes"),
) -> None:
    """Write the files of a Flower deployment: keys, certificates, scripts, systemd units and settings."""
    from fedsim.deploy.files import Federation
    from fedsim.deploy.files import deploy as write

    hosts = tuple(name.strip() for name in host.split(","))
    write(Federation(nodes, hosts, port, name, insecure), Path(out), Path(ca) if ca else None)
    print(f"{out}: superlink/ is for the server, nodes/0/ ... for a machine each, client/ for the user of flwr run;")
    print("the next steps are in docs/deployment.md" + ("" if insecure else "; ca/ stays here, ca.key is secret"))


def _runner(address: str | None, cpus: float | None, gpus: float | None, engine: str, track: str) -> Runner:
    """The runner of the cells: Ray if there is an `address`, otherwise this process, one cell after the other."""
    from fedsim.experiments.track import check_tracker

    checked = engine_named(engine)
    check_tracker(track, checked)
    if address is None:
        for flag, share in (("cpus-per-cell", cpus), ("gpus-per-cell", gpus)):
            if share is not None:
                raise UserError(f"{flag} = {share} is a share of a Ray node: give --ray too")
        from fedsim.experiments.sweep import OneByOne

        return OneByOne(checked, track)
    if engine == "flower":
        raise UserError("engine = flower with --ray: clients would wait for the cores of their cell: leave one out")
    if cpus is not None and not (cpus > 0 and (cpus < 1 or cpus.is_integer())):
        raise UserError(
            f"cpus-per-cell = {cpus} is not a number of cores: give 1, 2, ... or less than 1, for instance 0.5"
        )
    if gpus is not None and not 0 < gpus <= 1:
        raise UserError(f"gpus-per-cell = {gpus} is not a share of a GPU: give above 0 and at most 1, e.g. 0.25")
    from fedsim.experiments.ray_sweep import OnRay

    return OnRay(checked, address, cpus, gpus, track)


def _print_cost(config: Config, mode: Mode, engine: Engine, track: str) -> None:
    """Print what a run would cost."""
    from fedsim.experiments.cost import Pace, plan_lines
    from fedsim.experiments.study import Cell
    from fedsim.runs.folder import run_folder

    _check_run(config, mode, engine, track)
    folder = run_folder(config, mode)
    print(*plan_lines([Cell((), mode, config.changed({"name": folder.name}))], Pace(folder.parent)), sep="\n")


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
