"""What LocalSGD costs beside its physical limit: every way to run a round, measured in turn, in one run.

The limit is centralized training at batch K * B: the same images and arithmetic, without replicas. A contestant runs
in a process of its own, a round to warm up and then some to be timed; all contestants take their turn in every
pass, so that a machine that slows down slows all of them. Figures are medians over rounds and passes.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from fedsim.bench_plain import plain_rounds
from fedsim.client_app import app as client_app
from fedsim.client_app import train_together
from fedsim.config import Config, cpu_count
from fedsim.data import batches, check_shards, draws, load_dataset
from fedsim.engine import take_steps
from fedsim.errors import UserError
from fedsim.fleet import FleetGrid, TrainTogether
from fedsim.flower import CHECKOUT, run_with_flwr
from fedsim.machine import prepare, resolve
from fedsim.models import build_model, set_dropout_streams
from fedsim.nodes import roll_call
from fedsim.optim import build_optimizer
from fedsim.records import provenance, read_rows, run_folder, written_whole
from fedsim.schedule import schedule_of
from fedsim.server_app import Progress, train_round
from strategies import LocalSGD, tensor_record

Rounds = Callable[[Config, int], list[float]]


@dataclass(frozen=True)
class Figure:
    """The timed rounds of one contestant at one K."""

    contestant: str
    config: Config
    seconds: list[float]  # of each round
    peak_bytes: int  # of the process's memory; on a GPU, of the device's

    @property
    def images_per_second(self) -> float:
        """The images trained on in a round over the median of its seconds."""
        images = self.config.clients * self.config.local_steps * self.config.batch_size
        return images / statistics.median(self.seconds)


def centralized_rounds(config: Config, rounds: int) -> list[float]:
    """The limit: J steps at batch K * B."""
    prepare(config)
    data = load_dataset(config)
    model = build_model(config.model, data.classes, config.seed, config.device)
    set_dropout_streams(model, [torch.Generator(config.device)])
    optimizer = build_optimizer(config, dict(model.named_parameters()))
    lr = schedule_of(config, Fraction(1), 1.0)
    batch = config.clients * config.batch_size
    order = np.resize(np.arange(len(data.train)), batch * config.local_steps)

    def one_round() -> None:
        stream = batches(data.train, draws(order, np.random.default_rng(0)), batch)
        take_steps(model, optimizer, stream, lr, 0, config.precision)

    return _timed(one_round, rounds, config.device)


def fleet_rounds(config: Config, rounds: int, train_together: TrainTogether | None = None) -> list[float]:
    """LocalSGD in this process: ``FleetGrid`` and the strategy, nothing tested or saved."""
    data = load_dataset(config)
    model = build_model(config.model, data.classes, config.seed, config.device)
    with FleetGrid(client_app, config, train_together) as grid:
        strategy = LocalSGD(workers=roll_call(grid, config.clients))
        progress = Progress(0, tensor_record(model.state_dict()))
        return _timed(lambda: train_round(grid, strategy, progress), rounds, config.device)


def flower_rounds(config: Config, rounds: int) -> list[float]:
    """LocalSGD by ``flwr run`` on Ray; the first round is left out, and the last, which tests and saves."""
    with tempfile.TemporaryDirectory() as folder:
        run = config.changed({"rounds": rounds + 2, "results-dir": folder, "name": "bench", "evaluate-every": 10**6})
        with contextlib.redirect_stdout(io.StringIO()):  # Flower's log
            run_with_flwr(run)
        ends = [row["seconds"] for row in read_rows(run_folder(run, "localsgd"))]
    return [end - begin for begin, end in itertools.pairwise(ends[:-1])]


CONTESTANTS: dict[str, tuple[Rounds, str]] = {
    "limit": (centralized_rounds, "centralized training at batch K * B"),
    "fleet": (fleet_rounds, "fedsim in one process"),
    "fused": (functools.partial(fleet_rounds, train_together=train_together), "the same, its replicas side by side"),
    "loop": (fleet_rounds, "the same, one client after the other on all cores"),
    "flower": (flower_rounds, "fedsim's app by flwr run, on Ray"),
    "plain": (plain_rounds, "a plain PyTorch loop: DataLoader, per-image transforms, one model after the other"),
}


def run_bench(
    keys: Mapping[str, Any],
    clients: Sequence[int],
    contestants: Sequence[str],
    rounds: int,
    passes: int,
    grow: bool,
    output: str,
    console: Console,
) -> None:
    """Measure, print the tables, write the file."""
    for name in contestants:
        if name not in CONTESTANTS:
            raise UserError(f"contestants = {name!r} is unknown: it must be one of {', '.join(CONTESTANTS)}")
    images = {"dataset": "synthetic", "synthetic-classes": 100, "synthetic-images": 50_000}
    config = resolve(Config().changed({**keys, **images}), "localsgd")
    for k in clients:
        check_shards(config, config.synthetic_images, k)
    flop, rate, starting = flop_per_image(config), matrix_rate(config.device), start_up(config.device)
    console.print(f"{config.device}: {rate / 1e9:,.0f} GFLOP/s in a matrix product; a run starts in {starting:.1f} s")
    figures = bench(config, clients, contestants, rounds, passes)
    console.print(table(figures, flop))
    grown = growth(config, rounds) if grow else []
    if grown:
        console.print(growth_table(grown))
    more = {"matrix_flop_per_second": rate, "flop_per_image": flop, "start_up_seconds": starting}
    write_figures(Path(output), [*figures, *grown], config.device, **more)
    console.print(output, soft_wrap=True, highlight=False)


def bench(config: Config, clients: Sequence[int], contestants: Sequence[str], rounds: int, passes: int) -> list[Figure]:
    """The figures of every contestant at every K: `rounds` timed rounds in each of `passes`."""
    figures: dict[tuple[int, str], list[Figure]] = {}
    for _, k, name in itertools.product(range(passes), clients, contestants):
        print(f"K = {k}: {name}", file=sys.stderr, flush=True)
        figures.setdefault((k, name), []).append(in_own_process(name, contest(config, k, name), rounds))
    return [
        Figure(name, parts[0].config, [s for part in parts for s in part.seconds], max(p.peak_bytes for p in parts))
        for (_, name), parts in figures.items()
    ]


def contest(config: Config, clients: int, contestant: str) -> Config:
    """`config` at K = `clients`; on the CPU every way gets all cores, as one step's threads or as clients at once."""
    alone = config.device == "cpu" and contestant in ("limit", "fused", "loop", "plain")
    return config.changed({"clients": clients, "threads": cpu_count() if alone else 1})


def in_own_process(contestant: str, config: Config, rounds: int) -> Figure:
    """One turn of a contestant, in a fresh process, whose memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_turn, contestant, config, rounds).result()


def _turn(contestant: str, config: Config, rounds: int) -> Figure:
    seconds = CONTESTANTS[contestant][0](config, rounds)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024
    if config.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated(config.device)
    return Figure(contestant, config, seconds, peak)


def _timed(one_round: Callable[[], Any], rounds: int, device: str) -> list[float]:
    """Seconds of each of `rounds` rounds, after one to warm up."""

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    seconds = []
    for _ in range(rounds + 1):
        wait()
        began = time.perf_counter()
        one_round()
        wait()
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def flop_per_image(config: Config) -> float:
    """Floating-point operations of a training step, for each image: those of convolutions and matrix products."""
    model = build_model(config.model, config.synthetic_classes, config.seed).eval()
    inputs = torch.zeros(8, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model(inputs).sum().backward()
    return float(counter.get_total_flops()) / len(inputs)


def matrix_rate(device: str) -> float:
    """FLOP/s of a large matrix product on `device`, in float32 on a CPU and in bfloat16 on a GPU; the best of ten."""
    size, dtype = (2048, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    torch.set_num_threads(cpu_count())
    one = torch.randn(size, size, device=device, dtype=dtype)
    seconds = _timed(lambda: one @ one, 10, device)
    return 2 * size**3 / min(seconds)


def growth(config: Config, rounds: int) -> list[Figure]:
    """How the fleet's round time grows: with K at J = 1 to 1,000 clients, and with J at K = 4, always `lenet5`."""
    small = config.changed({"model": "lenet5", "batch-size": 32})
    cells = [(k, 1) for k in (1, 10, 100, 1000)] + [(4, j) for j in (1, 4, 16, 64)]
    return [in_own_process("fleet", contest(small, k, "fleet").changed({"local-steps": j}), rounds) for k, j in cells]


def start_up(device: str) -> float:
    """Seconds that ``run.py localsgd`` takes for a round of one small step: its start, and little else."""
    with tempfile.TemporaryDirectory() as folder:
        keys = "--dataset synthetic --synthetic-images 64 --model lenet5 --clients 1 --local-steps 1 --rounds 1".split()
        command = [sys.executable, str(CHECKOUT / "run.py"), "localsgd", *keys]
        began = time.perf_counter()
        subprocess.run([*command, "--device", device, "--results-dir", folder], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began


def table(figures: Sequence[Figure], flop: float) -> Table:
    """The figures, each beside the limit at its K."""
    legend = "\n".join(f"{name}: {CONTESTANTS[name][1]}" for name in dict.fromkeys(f.contestant for f in figures))
    result = Table(title="A round of LocalSGD: medians (least to most)", caption=legend, caption_justify="left")
    for name in ("K", "contestant", "s a round", "images/s", "GFLOP/s", "of the limit", "peak MiB"):
        result.add_column(name, justify="left" if name == "contestant" else "right")
    limits = {figure.config.clients: figure.images_per_second for figure in figures if figure.contestant == "limit"}
    for figure in figures:
        rate, k = figure.images_per_second, figure.config.clients
        result.add_row(
            str(k),
            figure.contestant,
            f"{statistics.median(figure.seconds):.3f} ({min(figure.seconds):.3f} to {max(figure.seconds):.3f})",
            f"{rate:,.0f}",
            f"{rate * flop / 1e9:,.1f}",
            f"{rate / limits[k]:.2f}" if k in limits else "",
            f"{figure.peak_bytes / 2**20:,.0f}",
        )
    return result


def growth_table(figures: Sequence[Figure]) -> Table:
    """The seconds of a round as K and J grow."""
    result = Table(title="lenet5, batch 32: how a round grows with K and J")
    for name in ("K", "J", "s a round", "ms a local step", "peak MiB"):
        result.add_column(name, justify="right")
    for figure in figures:
        k, j, seconds = figure.config.clients, figure.config.local_steps, statistics.median(figure.seconds)
        step = f"{1000 * seconds / (k * j):.2f}"
        result.add_row(str(k), str(j), f"{seconds:.3f}", step, f"{figure.peak_bytes / 2**20:,.0f}")
    return result


def write_figures(path: Path, figures: Sequence[Figure], device: str, **more: Any) -> None:
    """Everything that was measured, with where it comes from, as one JSON file."""
    content = {
        **provenance(device),
        **more,
        "figures": [
            {**asdict(figure), "config": figure.config.as_keys(), "images_per_second": figure.images_per_second}
            for figure in figures
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
