"""Launches, waits and bytes of a step and of a round on the emulated GPU: ``python -m tests.gpu_counts`` prints them.

They do not depend on the values of tensors. Bytes are those that operators read and write, each tensor counted once
for each operator.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter

from fedsim.config import Config
from fedsim.federation.client_app import app, train_together
from fedsim.federation.in_process import InProcessGrid
from fedsim.federation.messenger import Messenger
from fedsim.federation.node_registry import NodeRegistry
from fedsim.federation.round import build_strategy, initial_progress, train_round
from fedsim.models import build_model
from fedsim.training import stacked
from fedsim.training.run_plan import run_plan
from tests.emulated_gpu import EmulatedGpu


def round_counts(config: Config, by_products: bool = False) -> Counter[str]:
    """What the second round of `config` takes on the emulated GPU, its clients stacked."""
    config = config.changed({"device": "cuda"})
    together = functools.partial(
        train_together, take_rounds=functools.partial(stacked.take_rounds, by_products=by_products)
    )
    with EmulatedGpu() as gpu, InProcessGrid(app, config, together) as grid:
        model = build_model(config.model, config.synthetic_classes, config.seed, config.device, config.precision)
        strategy = build_strategy(config, run_plan(config, config.synthetic_images), model)
        messenger, progress = Messenger(grid), initial_progress(config, model)
        registry = NodeRegistry(messenger, config)
        registry.wait_for(config.clients)
        progress, _ = train_round(messenger, config, strategy, registry, progress)
        with gpu.counting() as counts:
            train_round(messenger, config, strategy, registry, progress)
        counts["captured"] = gpu.counts["captured"]
        return counts


def main() -> None:
    base = {"dataset": "synthetic", "synthetic-classes": 100, "synthetic-images": 256, "model": "lenet-bn"}
    for clients in map(int, sys.argv[1:] or ("1", "4", "12", "64")):
        config = Config().changed({**base, "batch-size": 1, "local-steps": 2, "clients": clients, "threads": 1})
        print(clients, dict(round_counts(config)))


if __name__ == "__main__":
    main()
