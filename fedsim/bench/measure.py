"""Time the variants of running a round of LocalSGD, compared with centralized training.

Centralized training at batch K * B is the reference: the same images and arithmetic, without replicas. Each variant
runs in a new process: one warm-up round, then timed rounds. Every pass measures all variants in turn, so that a slow
phase of the machine affects all of them. Timings are medians over rounds and passes.

Each rate is also compared with what the device could reach at best by its measured rates (`fedsim.bench.bound`): with
K models that is less than with one.

On a GPU it also times centralized training at the batch sizes of Table 1, in the configured precision and in bf16,
compared with the rate of a matrix product. In files of earlier versions `timings` is called `figures`, `variant`
`contestant`, and the variants `centralized`, `in-process` and `stacked` are `limit`, `fleet` and `fused`.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fedsim.bench.bound import Rates, bound, measure_rates
from fedsim.bench.turn import Timing, take_turn
from fedsim.bench.variants import ON_CPU, ON_GPU, THREADED, VARIANTS
from fedsim.config import Config, cpu_count
from fedsim.data.partition import check_shards
from fedsim.device import resolve
from fedsim.errors import RunFailed, UserError
from fedsim.experiments.cost import flop_per_image
from fedsim.experiments.study import read_study
from fedsim.federation.flwr_run import CHECKOUT
from fedsim.models import check_model
from fedsim.provenance import provenance
from fedsim.records import atomic_write


def run_bench(
    keys: Mapping[str, Any],
    clients: Sequence[int],
    variants: Sequence[str],
    rounds: int,
    passes: int,
    limit: float,
    grow: bool,
    output: str,
    console: Console,
) -> None:
    """Measure `variants` (empty: those for the device), print the tables, and write the file `output`.

    Each of `passes` times `rounds` rounds; a turn is ended after `limit` seconds. Raises UserError before anything is
    measured, and RunFailed at the end if a turn failed.
    """
    for name in variants:
        if name not in VARIANTS:
            raise UserError(f"variants = {name!r} is unknown: it must be one of {', '.join(VARIANTS)}")
    images = {"dataset": "synthetic", "synthetic-classes": 100, "synthetic-images": 50_000}
    config = resolve(Config().changed({**keys, **images, "rounds": rounds + 1}), "localsgd")  # one to warm up
    check_model(config)
    if config.local_epochs:
        raise UserError(f"local-epochs = {config.local_epochs}: a round that is timed has J local steps: leave it out")
    for k in clients:
        check_shards(config.changed({"clients": k}), config.synthetic_images, k)
    check_output(Path(output))
    on_gpu = config.device.startswith("cuda")
    flop = flop_per_image(config)
    precisions = dict.fromkeys((config.precision, "bf16") if on_gpu else (config.precision,))
    rates: dict[str, Rates] = {precision: measure_rates(config.device, precision) for precision in precisions}
    if on_gpu:
        torch.cuda.empty_cache()  # for the processes that follow
    starting = start_up(config.device)
    for precision, rate in rates.items():
        console.print(f"{config.device}, {precision}: {rate.flop / 1e9:,.0f} GFLOP/s in a matrix product")
    memory = rates[config.precision].bytes
    console.print(f"{memory / 1e9:,.1f} GB/s in a copy; a run starts in {starting:.1f} s")
    chosen = list(dict.fromkeys(variants)) or (ON_GPU if on_gpu else ON_CPU)
    turns = [(name, at(config, k, name)) for _, k, name in itertools.product(range(passes), clients, chosen)]
    timings, failed = measure(turns, rounds, limit)
    console.print(table(timings, flop, rates))
    large, more = measure(large_batches(config) if on_gpu else [], rounds, limit)
    if large:
        console.print(large_table(large, flop, rates))
    grown, still_more = measure(growth(config) if grow else [], rounds, limit)
    if grown:
        console.print(growth_table(grown))
    found = {"matrix_flop_per_second": rates[config.precision].flop, "memory_bytes_per_second": memory}
    found |= {"flop_per_image": flop, "start_up_seconds": starting}
    write_timings(Path(output), [*timings, *large, *grown], config.device, **found)
    console.print(output, soft_wrap=True, highlight=False)
    if failed := [*failed, *more, *still_more]:
        raise RunFailed(f"these failed, the others are in {output}: {'; '.join(failed)}")


def check_output(path: Path) -> None:
    """Raise UserError if `path` cannot be written."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path.with_name(f"{path.name}.part")):
            pass
        path.with_name(f"{path.name}.part").unlink()
    except OSError as error:
        raise UserError(f"output = {path} cannot be written ({error.strerror}): give another -o") from error


def measure(turns: Iterable[tuple[str, Config]], rounds: int, limit: float) -> tuple[list[Timing], list[str]]:
    """The timings of all `turns`, joined by variant and configuration, and the errors of those that failed.

    After a failure the same variant and configuration has no further turn.
    """
    timings: dict[tuple[str, Config], Timing] = {}
    failed: dict[tuple[str, Config], str] = {}
    for turn in turns:
        if turn in failed:
            continue
        name, config = turn
        label = f"K = {config.clients}, J = {config.local_steps}: {name}"
        print(label, file=sys.stderr, flush=True)
        try:
            timing = take_turn(name, config, rounds, limit)
        except RunFailed as error:
            failed[turn] = f"{label}: {error}"
            print(failed[turn], file=sys.stderr, flush=True)
        else:
            timings[turn] = timings[turn].joined(timing) if turn in timings else timing
    return list(timings.values()), list(failed.values())


def at(config: Config, clients: int, variant: str) -> Config:
    """`config` at K = `clients`; on a CPU every variant uses all cores, by threads of a step or parallel clients."""
    all_cores = config.device == "cpu" and variant not in THREADED
    return config.changed({"clients": clients, "threads": cpu_count() if all_cores else 1})


def large_batches(config: Config) -> list[tuple[str, Config]]:
    """Centralized training at the batch sizes of Table 1, in the precision of `config` and in bf16."""
    batches = read_study("table1").grid["batch-size"]
    return [
        ("centralized", at(config.changed({"precision": precision, "batch-size": batch}), 1, "centralized"))
        for precision, batch in itertools.product(dict.fromkeys((config.precision, "bf16")), batches)
    ]


def growth(config: Config) -> list[tuple[str, Config]]:
    """Rounds of `lenet5` at J = 1 with 1 to 1,000 clients, and at K = 4 with growing J."""
    small = config.changed({"model": "lenet5", "batch-size": 32})
    cells = [(k, 1) for k in (1, 10, 100, 1000)] + [(4, j) for j in (1, 4, 16, 64)]
    return [("in-process", at(small, k, "in-process").changed({"local-steps": j})) for k, j in cells]


def start_up(device: str) -> float:
    """Seconds of ``run.py localsgd`` with one round of one small step, nearly all of them its start-up."""
    with tempfile.TemporaryDirectory() as folder:
        keys = "--dataset synthetic --synthetic-images 64 --model lenet5 --clients 1 --local-steps 1 --rounds 1".split()
        command = [sys.executable, str(CHECKOUT / "run.py"), "localsgd", *keys]
        began = time.perf_counter()
        done = subprocess.run([*command, "--device", device, "--results-dir", folder], capture_output=True, text=True)
        if done.returncode:
            raise RunFailed(f"the run of one step failed: {' '.join(done.stderr.splitlines()[-1:])}")
        return time.perf_counter() - began


def table(timings: Sequence[Timing], flop: float, rates: Mapping[str, Rates]) -> Table:
    """The timings, compared with centralized training at the same K, and with the bound by the rates of a precision."""
    legend = "\n".join(f"{name}: {VARIANTS[name][1]}" for name in dict.fromkeys(each.variant for each in timings))
    result = Table(title="A round of LocalSGD: medians (least to most)", caption=legend, caption_justify="left")
    columns = ("K", "variant", "s a round", "images/s", "GFLOP/s", "of centralized", "of in-process", "of its bound")
    for name in (*columns, peak_label(timings)):
        result.add_column(name, justify="left" if name == "variant" else "right")
    references = [
        {each.config.clients: each.images_per_second for each in timings if each.variant == name}
        for name in ("centralized", "in-process")
    ]
    for each in timings:
        rate, k = each.images_per_second, each.config.clients
        result.add_row(
            str(k),
            each.variant,
            f"{statistics.median(each.seconds):.3f} ({min(each.seconds):.3f} to {max(each.seconds):.3f})",
            f"{rate:,.0f}",
            f"{rate * flop / 1e9:,.1f}",
            *(f"{rate / reference[k]:.2f}" if k in reference else "" for reference in references),
            f"{of_bound(each, rates[each.config.precision]):.2f}",
            f"{each.peak_bytes / 2**20:,.0f}",
        )
    return result


def of_bound(timing: Timing, rates: Rates) -> float:
    """The least time that a device of such rates needs for a round, over the median that was measured."""
    centralized = timing.variant.startswith("centralized")
    return bound(timing.config, rates, centralized) / statistics.median(timing.seconds)


def peak_label(timings: Sequence[Timing]) -> str:
    """The column title of `Timing.peak_bytes`."""
    on_gpu = any(each.config.device.startswith("cuda") for each in timings)
    return "peak MiB of the GPU" if on_gpu else "peak MiB, sum of processes"


def large_table(timings: Sequence[Timing], flop: float, rates: Mapping[str, Rates]) -> Table:
    """Centralized training by batch size, compared with the device's matrix product in the same precision."""
    result = Table(title="Centralized training, J steps a round")
    for name in ("precision", "batch", "ms a step", "images/s", "TFLOP/s", "of the matrix product", "of its bound"):
        result.add_column(name, justify="right")
    for each in timings:
        config, rate = each.config, each.images_per_second
        result.add_row(
            config.precision,
            str(config.batch_size),
            f"{1000 * statistics.median(each.seconds) / config.local_steps:.2f}",
            f"{rate:,.0f}",
            f"{rate * flop / 1e12:,.2f}",
            f"{rate * flop / rates[config.precision].flop:.3f}",
            f"{of_bound(each, rates[config.precision]):.2f}",
        )
    return result


def growth_table(timings: Sequence[Timing]) -> Table:
    """The seconds of a round as K and J grow."""
    result = Table(title="lenet5, batch 32: how a round grows with K and J")
    for name in ("K", "J", "s a round", "ms a local step", peak_label(timings)):
        result.add_column(name, justify="right")
    for each in timings:
        k, j, seconds = each.config.clients, each.config.local_steps, statistics.median(each.seconds)
        step = f"{1000 * seconds / (k * j):.2f}"
        result.add_row(str(k), str(j), f"{seconds:.3f}", step, f"{each.peak_bytes / 2**20:,.0f}")
    return result


def write_timings(path: Path, timings: Sequence[Timing], device: str, **rates: float) -> None:
    """Write all measurements and their provenance to a JSON file."""
    content = {
        **provenance(device),
        **rates,
        "timings": [
            {**asdict(each), "config": each.config.as_keys(), "images_per_second": each.images_per_second}
            for each in timings
        ],
    }
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
