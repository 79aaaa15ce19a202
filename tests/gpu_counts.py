"""Launches and waits on the emulated GPU: ``python -m tests.gpu_counts`` prints the tables of docs/engine.md."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fedsim.bench.variants import METHODS
from fedsim.config import Config
from fedsim.data.image_sets import facts_of
from fedsim.federation.client_app import app
from fedsim.federation.in_process import InProcessGrid, stacked_trainers
from fedsim.federation.messenger import Messenger
from fedsim.federation.node_registry import NodeRegistry
from fedsim.federation.round import initial_progress, train_round
from fedsim.federation.strategy import build_strategy
from fedsim.models import build_model
from fedsim.training.run_plan import run_plan
from tests.emulated_gpu import EmulatedGpu

PAPER = Config().changed({"dataset": "synthetic:classes=100,images=256", "threads": 1})


def round_counts(config: Config, by_products: bool = False) -> Counter[str]:
    """What the second round of `config` takes on the emulated GPU, all clients at once, and the kernels of a step."""
    config = config.changed({"device": "cuda", "evaluate-every": 10**6})
    with EmulatedGpu() as gpu, InProcessGrid(app, config, stacked_trainers(config, by_products)) as grid:
        model = build_model(config.model, facts_of(config).classes, config.seed, config.device, config.precision)
        strategy = build_strategy(config, run_plan(config), model)
        messenger, progress = Messenger(grid), initial_progress(config, model)
        registry = NodeRegistry(messenger, config)
        registry.wait_for(config.clients)
        with gpu.counting() as first:
            progress, *_ = train_round(messenger, config, strategy, registry, progress)
        with gpu.counting() as counts:
            train_round(messenger, config, strategy, registry, progress)
    counts["captured"] = first["captured"]
    return counts


def print_methods(config: Config) -> None:
    """What a round of each method that `run.py bench` compares takes, by groups."""
    header("K", "method", "kernels of a step", "launches a round", "waits", "copies from the host")
    for keys in METHODS.values():
        print_row(config.clients, method_of(keys), round_counts(config.changed(keys)))


def method_of(keys: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key} = {value}`" for key, value in keys.items())


def print_row(clients: int, what: str, found: Counter[str]) -> None:
    counts = [found[name] for name in ("captured", "launches", "waits", "copies")]
    print(f"| {clients} | {what} | {' | '.join(map(str, counts))} |")


def header(*names: str) -> None:
    print(f"| {' | '.join(names)} |")
    print("|---" * len(names) + "|")


def main() -> None:
    header("K", "way", "kernels of a step", "launches a round", "waits", "copies from the host")
    small = PAPER.changed({"batch-size": 1, "local-steps": 1})
    for clients in map(int, sys.argv[1:] or (1, 4, 12, 64)):
        for way in ("groups", "products") if clients in (4, 12) else ("groups",):
            print_row(clients, way, round_counts(small.changed({"clients": clients}), way == "products"))
    print()
    print_methods(small.changed({"clients": 4}))


if __name__ == "__main__":
    main()
