"""Time the variants of running a round of LocalSGD, compared with centralized training.

Centralized training at batch K * B is the reference: the same images and arithmetic, without replicas. Each variant
runs in a new process: one warm-up round, then timed rounds. Every pass gives each variant one such turn, so that a
slow phase of the machine affects all of them. Timings are medians over rounds and passes.

On a GPU, centralized training is also timed at the batch sizes of Table 1, in the configured precision and in bf16. In
files of earlier versions `timings` is called `figures`, `variant` `contestant`, and the variants `centralized`,
`in-process` and `stacked` are `limit`, `fleet` and `fused`.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from fedsim.bench.tables import growth_table, large_table, rounds_table
from fedsim.bench.turn import Timing, take_turn
from fedsim.bench.variants import ON_CPU, ON_GPU, THREADED, VARIANTS
from fedsim.config import Config
from fedsim.config.options import BenchOptions
from fedsim.data.datasets import training_examples
from fedsim.data.partition import check_shards
from fedsim.device import cpu_count, resolve
from fedsim.errors import RunFailed, UserError
from fedsim.experiments.cost import flop_per_image
from fedsim.experiments.study import read_study
from fedsim.federation.flwr_run import CHECKOUT
from fedsim.models import check_model
from fedsim.system.files import atomic_write
from fedsim.system.provenance import provenance

START_LIMIT = 600  # seconds
TimedIn = tuple[str, Config]  # a variant, and the configuration that it is timed in


def run_bench(keys: Mapping[str, Any], options: BenchOptions, console: Console) -> None:
    """Measure the variants (none given: those for the device), print the tables, and write the file.

    The file is written before each table is printed, so that an error there loses no measurement. Raises UserError
    before anything is measured, and RunFailed at the end if a turn failed.
    """
    config, out = checked_config(keys, options), Path(options.out)
    check_output(out)
    starting = start_up(config.device)
    console.print(f"a run starts in {starting:.1f} s")
    facts = {"flop_per_image": flop_per_image(config), "start_up_seconds": starting}
    timings: list[Timing] = []
    failed: list[str] = []
    for turns, table_of in comparisons(config, options):
        found, errors = measure(turns, options.timed, options.time_limit)
        timings += found
        failed += errors
        write_timings(out, timings, config.device, **facts)
        if found:
            console.print(table_of(found))
    console.print(str(out), soft_wrap=True, highlight=False)
    if failed:
        raise RunFailed(f"these failed, the others are in {out}: {'; '.join(failed)}")


def checked_config(keys: Mapping[str, Any], options: BenchOptions) -> Config:
    """The configuration with `keys`, on synthetic images; raises UserError if a variant or a K cannot be measured."""
    for name in options.variants:
        if name not in VARIANTS:
            raise UserError(f"variants = {name!r} is unknown: it must be one of {', '.join(VARIANTS)}")
    images = {"dataset": "synthetic:classes=100,images=50000"}
    config = resolve(Config().changed({**keys, **images, "rounds": options.timed + 1}), "localsgd")  # one to warm up
    check_model(config)
    if config.local_epochs:
        raise UserError(f"local-epochs = {config.local_epochs}: a round that is timed has J local steps: leave it out")
    for k in options.clients:
        check_shards(config.changed({"clients": k}), training_examples(config), k)
    return config


def comparisons(
    config: Config, options: BenchOptions
) -> Iterator[tuple[list[TimedIn], Callable[[list[Timing]], RenderableType]]]:
    """The turns of each table, and the function that makes the table of their timings."""
    on_gpu = config.device.startswith("cuda")
    chosen = list(dict.fromkeys(options.variants)) or (ON_GPU if on_gpu else ON_CPU)
    passes = itertools.product(range(options.passes), options.clients, chosen)
    yield [(name, at(config, k, name)) for _, k, name in passes], rounds_table
    if on_gpu:
        yield large_batches(config), large_table
    if options.grow:
        yield growth(config), growth_table


def check_output(path: Path) -> None:
    """Raise UserError if `path` cannot be written."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"out = {path} cannot be written ({error.strerror}): give another -o") from error


def measure(turns: Iterable[TimedIn], rounds: int, limit: float) -> tuple[list[Timing], list[str]]:
    """The timings of all `turns`, joined by variant and configuration, and the errors of those that failed.

    After a failure the same variant and configuration has no further turn.
    """
    timings: dict[TimedIn, Timing] = {}
    failed: dict[TimedIn, str] = {}
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
    """`config` at K = `clients`; on a CPU every variant uses all cores, in threads of a step or parallel clients."""
    all_cores = config.device == "cpu" and variant not in THREADED
    return config.changed({"clients": clients, "threads": cpu_count() if all_cores else 1})


def large_batches(config: Config) -> list[TimedIn]:
    """Centralized training at the batch sizes of Table 1, in the precision of `config` and in bf16."""
    batches = read_study("table1").grid["batch-size"]
    return [
        ("centralized", at(config.changed({"precision": precision, "batch-size": batch}), 1, "centralized"))
        for precision, batch in itertools.product(dict.fromkeys((config.precision, "bf16")), batches)
    ]


def growth(config: Config) -> list[TimedIn]:
    """Rounds of `lenet5` at J = 1 with 1 to 1,000 clients, and at K = 4 with growing J."""
    small = config.changed({"model": "lenet5", "batch-size": 32})
    cells = [(k, 1) for k in (1, 10, 100, 1000)] + [(4, j) for j in (1, 4, 16, 64)]
    return [("in-process", at(small, k, "in-process").changed({"local-steps": j})) for k, j in cells]


def start_up(device: str) -> float:
    """Seconds of ``run.py localsgd`` with one round of one small step: nearly all of it is start-up."""
    with tempfile.TemporaryDirectory() as folder:
        keys = "--dataset synthetic:images=64 --model lenet5 --clients 1 --local-steps 1 --rounds 1".split()
        command = [sys.executable, str(CHECKOUT / "run.py"), "localsgd", *keys]
        began = time.perf_counter()
        command += ["--device", device, "--results-dir", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=START_LIMIT)
        except subprocess.TimeoutExpired as error:
            raise RunFailed(f"the run of one step was not done within {START_LIMIT} s") from error
        if done.returncode:
            raise RunFailed(f"the run of one step failed: {' '.join(done.stderr.splitlines()[-1:])}")
        return time.perf_counter() - began


def write_timings(path: Path, timings: Sequence[Timing], device: str, **facts: float) -> None:
    """Write all measurements, some `facts` about the run, and their provenance to a JSON file."""
    content = {
        **provenance(device),
        **facts,
        "timings": [
            {**asdict(each), "config": each.config.as_keys(), "images_per_second": each.images_per_second}
            for each in timings
        ],
    }
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
