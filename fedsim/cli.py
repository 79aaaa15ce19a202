"""The command line. Every configuration key is a flag; what goes wrong is one line and an exit code."""

from __future__ import annotations

import inspect
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import typer
from rich.console import Console
from typer.core import TyperCommand

from fedsim.config import ANY, FIELDS, Mode, kebab
from fedsim.errors import RunFailed, UserError

cli = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="LocalSGD and its large-batch rivals: how often must machines that train together talk?",
)
OF_A_SHARD = ("dataset", "data-dir", "synthetic-classes", "synthetic-images", "validation", "clients", "seed")
KINDS = {int: "INTEGER", float: "NUMBER", str: "TEXT", bool: "BOOLEAN"}


def main() -> None:
    """Run the command; exit with 2 on bad input, 1 on a failed run, 130 on Ctrl-C, 143 when asked to end."""
    import click

    # As an exception, so that what was started (a SuperLink) is ended on the way out
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        cli(standalone_mode=False)
    except click.UsageError as error:
        _fail(error.format_message().replace("\n", " "), 2)
    except (UserError, RunFailed) as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; the same command goes on from the last checkpoint", 130)


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def keys_of(mode: Mode, without: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag for every key of `mode`; it receives those that were used as its argument `keys`."""

    def with_flags(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "keys"]
        names = [name for name, item in FIELDS.items() if mode in item.metadata["modes"] and kebab(name) not in without]

        def run(**arguments: Any) -> None:
            given = {kebab(name): arguments.pop(name) for name in names}
            command(**arguments, keys={name: value for name, value in given.items() if value is not None})

        parameters = own + [_flag(name) for name in names]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return with_flags


def _flag(name: str) -> inspect.Parameter:
    """A key as an option that is None where it is not used; the key's own check says what is wrong with a value."""
    item = FIELDS[name]
    boolean = isinstance(item.default, bool)
    accepts = "" if item.metadata["accepts"] is ANY else f"; {item.metadata['accepts'].words}"
    default = "empty" if item.default == "" else str(item.default).lower() if boolean else item.default
    option = typer.Option(
        None,
        f"--{kebab(name)}" + (f"/--no-{kebab(name)}" if boolean else ""),
        help=f"{item.metadata['help']}{accepts} (default: {default})",
        metavar=None if boolean else KINDS[type(item.default)],
        show_default=False,
        rich_help_panel="Keys",
    )
    annotation: Any = Optional[bool if boolean else str]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)


RUNS_OWN = ("results-dir", "name", "resume")
PRESET = typer.Option("", "--preset", help="settings of fedsim/studies/NAME.toml; flags win over it", metavar="NAME")
RERUN = typer.Option(False, "--rerun", help="run again what is finished or broken off")
ENGINE = typer.Option("fleet", "--engine", help="fleet or fused: in this process; flower: on Ray", metavar="NAME")
RAY = typer.Option(
    None,
    "--ray",
    help="run the cells side by side on a Ray cluster: ADDRESS is its host:port, or auto; without one RAY_ADDRESS, or "
    "else a Ray of its own on this machine. GPUs that this machine lacks are to be named: --device cuda",
    metavar="[ADDRESS]",
)
CPUS = typer.Option(None, "--cpus-per-cell", help="with --ray: a cell's share of a node's cores (default: --threads)")
GPUS = typer.Option(None, "--gpus-per-cell", help="with --ray: a cell's share of a GPU, for instance 0.25 (default: 1)")
STUDIES = typer.Argument(None, metavar="[STUDY]...", help="names of fedsim/studies/, or TOML files")


class RayCommand(TyperCommand):
    """A command whose --ray may stand without its ADDRESS."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--ray" in args:
            after = args.index("--ray") + 1
            if after == len(args) or not re.fullmatch("auto|local|[^-].*:.*", args[after]):
                args = [*args[:after], "", *args[after:]]
        return super().parse_args(ctx, args)


@cli.command()
@keys_of("centralized")
def centralized(keys: dict[str, Any], preset: str = PRESET, rerun: bool = RERUN) -> None:
    """Train on one machine that sees all images: the large-batch rivals."""
    _run("centralized", keys, preset, rerun)


@cli.command()
@keys_of("localsgd")
def localsgd(keys: dict[str, Any], preset: str = PRESET, rerun: bool = RERUN, engine: str = ENGINE) -> None:
    """Train by LocalSGD: K clients, J local steps a round, one average."""
    _run("localsgd", keys, preset, rerun, engine)


@cli.command(cls=RayCommand)
@keys_of("localsgd", without=("clients", "local-steps", "seed", "resume"))
def grid(
    keys: dict[str, Any],
    clients: str = typer.Option("4,12", "--clients", help="the K of cells, with commas", metavar="LIST"),
    local_steps: str = typer.Option("10,20,30", "--local-steps", help="the J of cells, with commas", metavar="LIST"),
    seeds: str = typer.Option("2025", "--seeds", help="the seeds of cells, with commas", metavar="LIST"),
    preset: str = PRESET,
    rerun: bool = RERUN,
    engine: str = ENGINE,
    ray: Optional[str] = RAY,
    cpus_per_cell: Optional[float] = CPUS,
    gpus_per_cell: Optional[float] = GPUS,
) -> None:
    """Run every cell of a K/J grid, then its table, CSV and plot."""
    from fedsim.experiments.grid import Grid, integers, run_grid

    cells = Grid(integers("clients", clients), integers("local-steps", local_steps), integers("seeds", seeds))
    spread = _spread(ray, cpus_per_cell, gpus_per_cell, engine)
    run_grid(cells, keys, preset, _engine(engine), rerun, Console(), spread)


@cli.command()
def demo(
    results_dir: str = typer.Option("results", "--results-dir", help="folder of the runs' folders", metavar="TEXT"),
    rerun: bool = RERUN,
) -> None:
    """A small K/J grid on synthetic images: offline, two cores, about a minute."""
    from fedsim.experiments.grid import run_demo

    run_demo(results_dir, rerun, Console())


@cli.command()
@keys_of(
    "localsgd", without=("clients", "dataset", "synthetic-images", "synthetic-classes", "results-dir", "name", "resume")
)
def bench(
    keys: dict[str, Any],
    clients: str = typer.Option("1,4,12,64", "--clients", help="the K to measure, with commas", metavar="LIST"),
    variants: str = typer.Option(
        "", "--variants", help="what to measure, with commas (default: all that suit the device)", metavar="LIST"
    ),
    timed: int = typer.Option(3, "--timed", help="timed rounds in each pass", min=1),
    passes: int = typer.Option(2, "--passes", help="turns that each variant takes", min=1),
    time_limit: float = typer.Option(900, "--time-limit", help="seconds after which a turn is ended", min=1),
    grow: bool = typer.Option(True, help="also measure how a round grows with K (to 1,000) and J"),
    output: str = typer.Option("results/bench.json", "--output", "-o", help="the file to write", metavar="FILE"),
) -> None:
    """Time a round in every way there is, in turn, beside centralized training at batch K * B."""
    from fedsim.bench.measure import run_bench
    from fedsim.experiments.grid import integers

    sizes = integers("clients", clients)
    names = [name.strip() for name in variants.split(",")] if variants else []
    run_bench(keys, sizes, names, timed, passes, time_limit, grow, output, Console())


@cli.command(cls=RayCommand)
def paper(
    studies: list[str] = STUDIES,
    seeds: str = typer.Option("", "--seeds", help="seeds of every cell, with commas (default: the study's)"),
    cells: str = typer.Option("", "--cells", help="these alone, with commas: 'k12-j20,k4-*' (default: all)"),
    results_dir: str = typer.Option("results", "--results-dir", help="folder of the studies' folders", metavar="TEXT"),
    data_dir: str = typer.Option("", "--data-dir", help="as for localsgd", metavar="TEXT"),
    device: str = typer.Option("auto", "--device", help="as for localsgd", metavar="TEXT"),
    threads: str = typer.Option("0", "--threads", help="as for localsgd", metavar="INTEGER"),
    stop_after_epochs: str = typer.Option("0", "--stop-after-epochs", help="as for localsgd", metavar="NUMBER"),
    precision: str = typer.Option("", "--precision", help="run each as a study apart, in this", metavar="TEXT"),
    rerun: bool = RERUN,
    engine: str = ENGINE,
    ray: Optional[str] = RAY,
    cpus_per_cell: Optional[float] = CPUS,
    gpus_per_cell: Optional[float] = GPUS,
) -> None:
    """Run the studies named, or, with none named, list them and what they would cost."""
    from fedsim.experiments.grid import integers
    from fedsim.experiments.paper import list_studies, run_studies

    chosen = integers("seeds", seeds) if seeds else []
    if not studies:
        list_studies(chosen, Console())
        return
    keys = {"data-dir": data_dir, "device": device, "threads": threads, "stop-after-epochs": stop_after_epochs}
    spread = _spread(ray, cpus_per_cell, gpus_per_cell, engine)
    only = [pattern.strip() for pattern in cells.split(",") if pattern.strip()]
    run_studies(studies, chosen, keys, Path(results_dir), _engine(engine), rerun, Console(), spread, precision, only)


OUT = typer.Option("report", "-o", "--out", help="folder to write to", metavar="FOLDER")
RESULTS = typer.Argument("results", help="folder of results, or one study's in it", metavar="[RESULTS]")


@cli.command()
@keys_of("localsgd", without=tuple(name for name in map(kebab, FIELDS) if name not in OF_A_SHARD))
def export_shards(
    keys: dict[str, Any],
    out: str = typer.Option(..., "-o", "--out", help="the new folder, with a folder for each client in it"),
) -> None:
    """Write the images of each client to a folder, for SuperNodes that hold only their own data.

    They are the shards of a run with the same keys, as images.npy and labels.npy: give each as its node's data-dir.
    """
    from fedsim.data.local_folder import write_shards
    from fedsim.experiments.presets import configure

    config = configure({**keys, "device": "cpu", "batch-size": 1})  # a shard does not depend on how it is trained on
    write_shards(config, Path(out))
    print(f"{config.clients} shards in {Path(out)}")


@cli.command()
def report(
    results: str = RESULTS,
    out: str = OUT,
    figure: str = typer.Option("", "--figure", help="make this one picture and its CSV alone", metavar="NAME"),
) -> None:
    """Make a page, a Markdown file, pictures and CSV of what is under a folder of results."""
    from fedsim.report.tables import build_report

    build_report(Path(results), Path(out), figure, Console())


@cli.command()
def plan(
    results: str = RESULTS,
    bandwidth: str = typer.Option(..., "--bandwidth", help="of a link, for instance 100Mbit or 12.5MB a second"),
    latency: str = typer.Option(..., "--latency", help="of a message one way, for instance 20ms"),
    target: float = typer.Option(..., "--target", help="the accuracy to reach, a fraction"),
    compute: str = typer.Option("", "--compute", help="a worker's time a step, for instance 10ms (default: measured)"),
    link: str = typer.Option("worker", "--link", help="worker: a link for each; server: all share one", metavar="NAME"),
    out: str = OUT,
) -> None:
    """Plan the time to a target accuracy on a network, for each cell under a folder of results.

    seconds = local_steps * compute + syncs * 2 * latency + bytes_on_the_link / bandwidth, of the first test at the
    target. With --link worker a link carries a worker's own bytes, up and down; with --link server those of all. The
    large batch on one machine counts as data-parallel SGD: a sync a step, of 4 bytes a parameter, worker and way.
    Compute time is measured as the median over the runs of seconds / images computed, tests included, times the
    images of a worker's step: each worker is taken to be as fast as the machine that made the records.
    """
    from fedsim.report.network import Network, duration, rate
    from fedsim.report.time_to_accuracy import plan_results

    if link not in ("worker", "server"):
        raise UserError(f"link = {link!r} is unknown: it must be one of worker, server")
    network = Network(
        rate(bandwidth), duration("latency", latency, zero=True), "worker" if link == "worker" else "server"
    )
    step = duration("compute", compute) if compute else None
    command = shlex.join(["python", "run.py", *sys.argv[1:]])
    plan_results(Path(results), target, network, step, Path(out), command, Console())


@cli.command()
def deploy(
    nodes: int = typer.Option(..., "--nodes", help="number of SuperNodes, one for each shard"),
    out: str = typer.Option("federation", "-o", "--out", help="the new folder", metavar="FOLDER"),
    host: str = typer.Option(
        "127.0.0.1", "--host", help="the SuperLink's DNS names and IP addresses, with commas; nodes use the first"
    ),
    port: int = typer.Option(8000, "--port", help="of the SuperLink; node I uses port + 1 + I on its own machine"),
    name: str = typer.Option("federation", "--name", help="of the connection: flwr run . NAME", metavar="NAME"),
    ca: str = typer.Option(
        "", "--ca", help="the ca/ of an earlier deployment, to sign with (default: a new authority)"
    ),
    insecure: bool = typer.Option(False, "--insecure", help="no TLS and no authentication of nodes"),
) -> None:
    """Write the files of a federation: keys, certificates, scripts, systemd units, settings."""
    from fedsim.deploy.files import Federation
    from fedsim.deploy.files import deploy as write

    hosts = tuple(name.strip() for name in host.split(","))
    write(Federation(nodes, hosts, port, name, insecure), Path(out), Path(ca) if ca else None)
    print(f"{out}: superlink/ is for the server, nodes/0/ ... for a machine each, client/ for whoever calls flwr run;")
    print("the next steps are in docs/deployment.md" + ("" if insecure else "; ca/ stays here, ca.key is secret"))


def _engine(name: str) -> Any:
    if name not in ("fleet", "fused", "flower"):
        raise UserError(f"engine = {name!r} is unknown: it must be one of fleet, fused, flower")
    return name


def _spread(address: str | None, cpus: float | None, gpus: float | None, engine: str) -> Any:
    """How to spread cells by these flags, or None where they are to be run one by one."""
    from fedsim.experiments.cells import Spread

    for flag, given in (("cpus-per-cell", cpus), ("gpus-per-cell", gpus)):
        if given is not None and address is None:
            raise UserError(f"{flag} = {given} is a share of a Ray node: give --ray too")
    if address is None:
        return None
    if engine == "flower":
        raise UserError("engine = flower with --ray: cells would wait for cores that they hold: leave one of them out")
    if cpus is not None and not (cpus > 0 and (cpus < 1 or cpus.is_integer())):
        raise UserError(
            f"cpus-per-cell = {cpus} is no share of a node: give 1, 2, ... or less than 1, for instance 0.5"
        )
    if gpus is not None and not 0 < gpus <= 1:
        raise UserError(f"gpus-per-cell = {gpus} is no share of a GPU: give above 0 and at most 1, for instance 0.25")
    return Spread(address, cpus, gpus)


def _run(mode: Mode, keys: dict[str, Any], preset: str, rerun: bool, engine: str = "fleet") -> None:
    from fedsim.device import resolve  # torch takes seconds to import: --help does not wait for it
    from fedsim.experiments.execute import execute
    from fedsim.experiments.presets import configure
    from fedsim.records import print_row, read_summary, resumed, run_folder

    config = resolve(resumed(configure(keys, preset)), mode)
    print(f"{mode} on {config.device} in {run_folder(config, mode)}", flush=True)
    run = execute(config, mode, _engine(engine), print_row, rerun)
    if not run.finished:
        print("stopped early: the same command without its --stop-after goes on from here")
    elif summary := read_summary(run.folder):
        best, final = summary["best_test_accuracy"], summary["final_test_accuracy"]
        print(f"finished: {run.tested_on} accuracy {final:.2%}, best {best:.2%}, {summary['seconds']:.1f} s")
