"""The contestants of `bench`: every way to run a round of LocalSGD, each timed in a process of its own."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedsim.bench.baseline_flower import tutorial_rounds
from fedsim.bench.baseline_torch import plain_rounds
from fedsim.config import Config
from fedsim.data.datasets import load_dataset
from fedsim.device import prepare
from fedsim.federation.client_app import app as client_app
from fedsim.federation.client_app import train_together
from fedsim.federation.flwr_run import run_with_flwr
from fedsim.federation.in_process import FleetGrid, TrainTogether
from fedsim.federation.node_registry import Roster
from fedsim.federation.round import build_strategy, train_round
from fedsim.federation.server_app import new_progress
from fedsim.models import build_model
from fedsim.optim import build_optimizer
from fedsim.records import read_rows, run_folder
from fedsim.training import stacked, streams
from fedsim.training.run_plan import run_plan
from fedsim.training.step import step_inputs
from fedsim.training.step_fn import make_step_fn, simple_step_fn

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


def centralized_rounds(config: Config, rounds: int, captured: bool = True, compiled: bool = False) -> list[float]:
    """The limit: J steps at batch K * B; on a GPU captured in a CUDA graph, or not; by torch.compile, or not."""
    prepare(config)
    data = load_dataset(config)
    model = build_model(config.model, data.classes, config.seed, config.device, config.precision)
    if compiled:
        model.compile()
    optimizer = build_optimizer(config, dict(model.named_parameters()))
    large = config.changed({"batch-size": config.clients * config.batch_size})
    order = np.resize(np.arange(len(data.train)), large.batch_size * config.local_steps)
    inputs = functools.partial(step_inputs, order, large.batch_size, 0, 0, 0, [config.lr] * config.local_steps)
    if captured:
        run = make_step_fn(large, model, optimizer, data.train, len(order))
    else:
        run = simple_step_fn(large, model, optimizer, data.train)
    return timed(lambda: float(run(inputs())), rounds, config.device)


def fleet_rounds(config: Config, rounds: int) -> list[float]:
    """LocalSGD in this process, one client in a thread: ``FleetGrid`` and the strategy, nothing tested or saved."""
    return _rounds_on_grid(config, rounds, None)


def fused_rounds(config: Config, rounds: int, **choices: Any) -> list[float]:
    """The same, all clients at once, as fedsim does or by the `choices` of `train_together`."""
    return _rounds_on_grid(config, rounds, functools.partial(train_together, **choices))


def _rounds_on_grid(config: Config, rounds: int, train_together: TrainTogether | None) -> list[float]:
    data = load_dataset(config)
    model = build_model(config.model, data.classes, config.seed, config.device, config.precision)
    with FleetGrid(client_app, config, train_together) as grid:
        strategy = build_strategy(config, run_plan(config, len(data.train)))
        roster, progress = Roster(grid, config), new_progress(config, model)
        roster.call(least=config.clients)
        return timed(lambda: train_round(grid, config, strategy, roster, progress), rounds, config.device)


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
    "limit-eager": (functools.partial(centralized_rounds, captured=False), "the same, not captured in a CUDA graph"),
    "limit-compiled": (
        functools.partial(centralized_rounds, compiled=True),
        "centralized training, its model by torch.compile",
    ),
    "fleet": (fleet_rounds, "fedsim in one process"),
    "fused": (fused_rounds, "the same, its replicas at once, as --engine fused does"),
    "fused-groups": (fused_rounds, "one stacked network, convolutions by groups"),
    "fused-products": (
        functools.partial(fused_rounds, take_rounds=functools.partial(stacked.take_rounds, by_products=True)),
        "one stacked network, convolutions by products",
    ),
    "fused-streams": (
        functools.partial(fused_rounds, take_rounds=streams.take_rounds),
        "each on a CUDA graph and a stream of its own",
    ),
    "loop": (fleet_rounds, "the same, one client after the other on all cores"),
    "flower": (flower_rounds, "fedsim's app by flwr run, on Ray"),
    "flower-plain": (tutorial_rounds, "Flower alone, on Ray: an app and FedAvg in the way of its tutorials"),
    "plain": (plain_rounds, "a plain PyTorch loop: DataLoader, per-image transforms, one model after the other"),
}

ON_CPU = ("limit", "fleet", "fused", "loop", "flower", "flower-plain", "plain")  # what `bench` measures unless told
ON_GPU = (
    "limit",
    "limit-eager",
    "limit-compiled",
    "fleet",
    "fused-groups",
    "fused-products",
    "fused-streams",
    "flower",
    "flower-plain",
    "plain",
)


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


def timed(one_round: Callable[[], Any], rounds: int, device: str) -> list[float]:
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
