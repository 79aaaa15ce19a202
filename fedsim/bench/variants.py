"""The variants that `bench` measures, as functions that time rounds of LocalSGD."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from fedsim.config import Config
from fedsim.data.datasets import load_dataset, task_of
from fedsim.device import prepare
from fedsim.federation.client_app import app as client_app
from fedsim.federation.flwr_run import run_with_flwr
from fedsim.federation.in_process import Handler, InProcessGrid, stacked_trainers
from fedsim.federation.messenger import Messenger
from fedsim.federation.node_registry import NodeRegistry
from fedsim.federation.resources import check_memory
from fedsim.federation.round import initial_progress, train_round
from fedsim.federation.strategy import build_strategy
from fedsim.models import initial_model
from fedsim.optim import build_optimizer
from fedsim.runs.folder import run_folder
from fedsim.runs.records import read_rows
from fedsim.training.run_plan import run_plan
from fedsim.training.step import Learner, run_steps, step_inputs
from fedsim.training.step_fn import make_step_fn

Rounds = Callable[[Config, int], list[float]]


def centralized_rounds(config: Config, rounds: int, captured: bool = True, compiled: bool = False) -> list[float]:
    """J centralized steps at batch K * B, optionally captured in a CUDA graph or compiled."""
    prepare(config)
    data = load_dataset(config)
    model = initial_model(config)
    if compiled:
        model.compile()
    optimizer = build_optimizer(config, dict(model.named_parameters()))
    large = config.changed({"batch-size": config.clients * config.batch_size})
    order = np.resize(np.arange(len(data.train)), large.batch_size * config.local_steps)
    rates = [config.lr] * config.local_steps
    inputs = partial(step_inputs, large.changed({"seed": 0}), 0, 0, rates, data.train, order)
    learner = Learner(model, optimizer, task_of(config), large.precision)
    if captured:
        run = make_step_fn(large, learner, data.train, len(order))
    else:
        run = partial(run_steps, learner, data.train, large.batch_size)
    return timed(lambda: float(run(inputs())), rounds, config.device)


def rounds_in_process(
    config: Config, rounds: int, trainers: Callable[[Config], Sequence[Handler]] = lambda config: (), **keys: Any
) -> list[float]:
    """LocalSGD with some `keys` changed, without tests and checkpoints; `trainers` makes those of the grid."""
    config = config.changed({**keys, "evaluate-every": 10**6})
    check_memory(config)
    model = initial_model(config)
    with InProcessGrid(client_app, config, trainers(config)) as grid:
        strategy = build_strategy(config, run_plan(config), model)
        messenger, progress = Messenger(grid), initial_progress(config, model)
        registry = NodeRegistry(messenger, config)
        registry.wait_for(config.clients)

        def one_round() -> None:
            nonlocal progress
            progress, *_ = train_round(messenger, config, strategy, registry, progress)

        return timed(one_round, rounds, config.device)


def flower_alone(config: Config, rounds: int) -> list[float]:
    """The rounds of `baseline_flower`."""
    from fedsim.bench.baseline_flower import tutorial_rounds  # takes seconds, in a process for each turn

    return tutorial_rounds(config, rounds)


def torch_alone(config: Config, rounds: int) -> list[float]:
    """The rounds of `baseline_torch`."""
    from fedsim.bench.baseline_torch import plain_rounds  # takes seconds

    return plain_rounds(config, rounds)


def flower_rounds(config: Config, rounds: int) -> list[float]:
    """LocalSGD by ``flwr run`` on Ray, without the first round (warm-up) and the last (test and checkpoint)."""
    with tempfile.TemporaryDirectory() as folder:
        run = config.changed({"rounds": rounds + 2, "results-dir": folder, "name": "bench", "evaluate-every": 10**6})
        run_with_flwr(run)
        ends = [row["seconds"] for row in read_rows(run_folder(run, "localsgd"))]
    return [end - begin for begin, end in itertools.pairwise(ends[:-1])]


METHODS: dict[str, dict[str, Any]] = {  # to be compared with plain LocalSGD, which is in-process
    "slowmo": {"outer": "slowmo"},
    "fedadam": {"outer": "fedadam"},
    "scaffold": {"local-rule": "scaffold"},
    "scaffold-inferred": {"local-rule": "scaffold-inferred", "momentum": 0.0, "weight-decay": 0.0},
    "int8": {"compress": "int8"},
    "topk": {"compress": "topk:ratio=0.01"},
    "powersgd": {"compress": "powersgd:rank=4"},
}
STACKED = partial(rounds_in_process, trainers=stacked_trainers)
VARIANTS: dict[str, tuple[Rounds, str]] = {
    "centralized": (centralized_rounds, "centralized training at batch K * B"),
    "centralized-eager": (partial(centralized_rounds, captured=False), "centralized, without a CUDA graph"),
    "centralized-compiled": (partial(centralized_rounds, compiled=True), "centralized, compiled by torch.compile"),
    "in-process": (rounds_in_process, "fedsim in one process, a client on each core"),
    "loop": (rounds_in_process, "fedsim in one process, one client after the other on all cores"),
    "stacked": (STACKED, "fedsim in one process, a stacked network on each core"),
    "stacked-groups": (STACKED, "stacked, convolutions by groups"),
    "stacked-products": (
        partial(rounds_in_process, trainers=partial(stacked_trainers, by_products=True)),
        "stacked, convolutions by matrix products",
    ),
    "flower": (flower_rounds, "fedsim's app run by flwr run, on Ray"),
    "flower-plain": (flower_alone, "Flower without fedsim: an app with SGDM and FedAvg, as in its tutorials"),
    "plain": (torch_alone, "PyTorch alone: a DataLoader, a model and SGDM for each client"),
    **{
        name: (
            partial(rounds_in_process, **keys),
            f"in-process with {', '.join(f'{key} = {value}' for key, value in keys.items())}",
        )
        for name, keys in METHODS.items()
    },
}
# Their clients run at the same time: on a CPU each, or each group of them, has one thread
THREADED = ("in-process", "stacked", "stacked-groups", "stacked-products", "flower", "flower-plain", *METHODS)

# What `bench` measures by default
ON_CPU = ("centralized", "in-process", "stacked", "loop", "flower", "flower-plain", "plain")
ON_GPU = (
    "centralized",
    "centralized-eager",
    "centralized-compiled",
    "in-process",
    "stacked-groups",
    "stacked-products",
    "flower",
    "flower-plain",
    "plain",
)


def timed(one_round: Callable[[], Any], rounds: int, device: str) -> list[float]:
    """Seconds of each of `rounds` rounds, after a warm-up round."""

    def synchronize() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    seconds = []
    for _ in range(rounds + 1):
        synchronize()
        began = time.perf_counter()
        one_round()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[1:]
