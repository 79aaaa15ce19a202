"""What LocalSGD costs beside its physical limit: every way to run a round, measured in turn, in one run.

The limit is centralized training at batch K * B: the same images and arithmetic, without replicas. A contestant runs
in a process of its own, a round to warm up and then some to be timed; all contestants take their turn in every
pass, so that a machine that slows down slows all of them. Figures are medians over rounds and passes.

On a GPU come to it: centralized training at the batches of Table 1, in the precision asked for and in bf16, beside the
rate of a matrix product; and what the cells of both tables would take at the rates measured, a seed each.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from fedsim.bench.variants import CONTESTANTS, ON_CPU, ON_GPU, Figure, in_own_process, timed
from fedsim.config import Config, cpu_count
from fedsim.data.datasets import load_dataset
from fedsim.data.partition import check_shards
from fedsim.device import prepare, resolve
from fedsim.errors import RunFailed, UserError
from fedsim.experiments.cost import cost
from fedsim.experiments.study import read_study
from fedsim.federation.flwr_run import CHECKOUT
from fedsim.models import build_model
from fedsim.records import atomic_write, provenance
from fedsim.training.step import evaluate

TEST_IMAGES = 10_000  # of CIFAR-100


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
    """Measure, print the tables, write the file; without `contestants`, those that the device calls for."""
    for name in contestants:
        if name not in CONTESTANTS:
            raise UserError(f"contestants = {name!r} is unknown: it must be one of {', '.join(CONTESTANTS)}")
    images = {"dataset": "synthetic", "synthetic-classes": 100, "synthetic-images": 50_000}
    config = resolve(Config().changed({**keys, **images}), "localsgd")
    for k in clients:
        check_shards(config, config.synthetic_images, k)
    on_gpu = config.device.startswith("cuda")
    flop, rate, starting = flop_per_image(config), matrix_rate(config.device), start_up(config.device)
    testing = test_rate(config)
    console.print(
        f"{config.device}: {rate / 1e9:,.0f} GFLOP/s in a matrix product; a run starts in {starting:.1f} s; "
        f"{testing:,.0f} images/s are tested"
    )
    figures, failed = bench(config, clients, contestants or (ON_GPU if on_gpu else ON_CPU), rounds, passes)
    console.print(table(figures, flop))
    large = large_batches(config, rounds) if on_gpu else []
    if large:
        console.print(large_table(large, flop, rate))
    estimate = seconds_of_tables(figures, large, testing)
    if estimate:
        console.print(f"An estimate from these rates: the cells of Tables 1 and 2, a seed each, take {estimate:,.0f} s")
    grown = growth(config, rounds) if grow else []
    if grown:
        console.print(growth_table(grown))
    more: dict[str, Any] = {"matrix_flop_per_second": rate, "flop_per_image": flop, "start_up_seconds": starting}
    more |= {"tested_images_per_second": testing, "estimated_seconds_of_both_tables": estimate}
    write_figures(Path(output), [*figures, *large, *grown], config.device, **more)
    console.print(output, soft_wrap=True, highlight=False)
    if failed:
        raise RunFailed(f"these failed, the others are in {output}: {'; '.join(failed)}")


def bench(
    config: Config, clients: Sequence[int], contestants: Sequence[str], rounds: int, passes: int
) -> tuple[list[Figure], list[str]]:
    """The figures of every contestant at every K: `rounds` timed rounds in each of `passes`; and which failed, why.

    One that fails does not cost the others their turns.
    """
    figures: dict[tuple[int, str], list[Figure]] = {}
    failed: dict[tuple[int, str], str] = {}
    for _, k, name in itertools.product(range(passes), clients, contestants):
        print(f"K = {k}: {name}", file=sys.stderr, flush=True)
        try:
            figures.setdefault((k, name), []).append(in_own_process(name, contest(config, k, name), rounds))
        except Exception as error:
            failed[k, name] = f"{name} at K = {k} ({type(error).__name__}: {error})"
    measured = [
        Figure(name, parts[0].config, [s for part in parts for s in part.seconds], max(p.peak_bytes for p in parts))
        for (_, name), parts in figures.items()
        if parts
    ]
    return measured, list(failed.values())


def contest(config: Config, clients: int, contestant: str) -> Config:
    """`config` at K = `clients`; on the CPU every way gets all cores, as one step's threads or as clients at once."""
    alone = config.device == "cpu" and contestant not in ("fleet", "flower", "flower-plain")
    return config.changed({"clients": clients, "threads": cpu_count() if alone else 1})


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
    seconds = timed(lambda: one @ one, 10, device)
    return 2 * size**3 / min(seconds)


def test_rate(config: Config) -> float:
    """Images that a model is tested on in a second."""
    prepare(config)
    data = load_dataset(config)
    model = build_model(config.model, data.classes, config.seed, config.device, config.precision)
    return len(data.test) / min(timed(lambda: evaluate(model, data.test, config.precision), 3, config.device))


def large_batches(config: Config, rounds: int) -> list[Figure]:
    """Centralized training at the batches of Table 1, in the precision of `config` and in bf16."""
    figures = []
    batches = read_study("table1").grid["batch-size"]
    for precision, batch in itertools.product(dict.fromkeys((config.precision, "bf16")), batches):
        one = config.changed({"precision": precision, "batch-size": batch})
        figures.append(in_own_process("limit", contest(one, 1, "limit"), rounds))
    return figures


def seconds_of_tables(figures: Sequence[Figure], large: Sequence[Figure], testing: float) -> float | None:
    """What the cells of Tables 1 and 2, a seed each, would take at the best rates measured in one precision.

    None where one of their K or batches was not measured. Starts, and the rows, are not counted.
    """
    rates: dict[tuple[str, int], float] = {}
    for figure in figures:
        if figure.contestant.startswith(("fleet", "fused")):
            cell = ("localsgd", figure.config.clients)
            rates[cell] = max(rates.get(cell, 0.0), figure.images_per_second)
    precisions = {figure.config.precision for figure in figures}
    for figure in large:
        if figure.config.precision in precisions:
            rates["centralized", figure.config.batch_size] = figure.images_per_second
    seconds = 0.0
    for _, mode, config in [*read_study("table1").cells([1]), *read_study("table2").cells([1])]:
        rate = rates.get((mode, config.batch_size if mode == "centralized" else config.clients))
        if rate is None:
            return None
        tests = (config.rounds or config.epochs) / config.evaluate_every
        seconds += cost(config, mode).images / rate + tests * TEST_IMAGES / testing
    return seconds


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


def large_table(figures: Sequence[Figure], flop: float, matrix: float) -> Table:
    """Centralized training by its batch, beside the device's matrix product."""
    result = Table(title="Centralized training, J steps a round")
    for name in ("precision", "batch", "ms a step", "images/s", "TFLOP/s", "of the matrix product"):
        result.add_column(name, justify="right")
    for figure in figures:
        config, rate = figure.config, figure.images_per_second
        result.add_row(
            config.precision,
            str(config.batch_size),
            f"{1000 * statistics.median(figure.seconds) / config.local_steps:.2f}",
            f"{rate:,.0f}",
            f"{rate * flop / 1e12:,.2f}",
            f"{rate * flop / matrix:.3f}",
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
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
