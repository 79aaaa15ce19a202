"""Which of the engines of one process trains the workers of a run: threads, or one stacked network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedsim.config import Config, Engine
from fedsim.data.datasets import image_shape
from fedsim.device import one_thread
from fedsim.models import check_model, cpu_model
from fedsim.training.stacked import why_not

STACKED_UP_TO = 100e6  # multiply-adds of a client's forward pass


def choose_engine(config: Config) -> Engine:
    """The faster engine for `config` (resolved): a function of its keys and of the kind of device alone.

    A stacked network saves the cost of launching each client's small operations; on many cores a large step does better
    with a client on each. CPU seconds of a round, stacked by threads (one core each, minima of 6 rounds in turn, on a
    shared machine):

    | multiply-adds of a client's step | K = 2 | K = 4 | K = 12 | K = 32 |
    |---|---|---|---|---|
    | 11 million: `lenet5`, batch 16 | | 0.85 | 0.55 | 0.56 |
    | 42 million: `lenet5`, batch 64 | 0.80 | 0.70 | 0.76 (time on 2 cores) | 0.73 |
    | 130 million: `lenet-bn`, batch 4 | | 1.07 | 1.00 | |
    | 170 million: `lenet5`, batch 256 | | 0.84 | 0.94 | |
    | 530 million: `lenet-bn`, batch 16 | | 1.00 | | |
    | 2,100 million: `lenet-bn`, batch 64 | | | 1.27 (time on 2 cores) | |

    A GPU, on which threads would take turns, always stacks; it has not been measured. Raises UserError where the model
    cannot be trained at all.
    """
    check_model(config)
    small = config.batch_size * multiply_adds(config) <= STACKED_UP_TO
    faster = config.clients_per_round > 1 and (small or config.device.startswith("cuda"))
    return "stacked" if faster and not why_not(config) else "threads"


@one_thread()
def multiply_adds(config: Config) -> int:
    """Those of the forward pass of one image in convolutions and fully connected layers."""
    counts: list[int] = []

    def count(layer: nn.Conv2d | nn.Linear, _: Any, output: Tensor) -> None:
        counts.append(output.numel() * layer.weight[0].numel())

    model = cpu_model(config).eval()
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    model(torch.zeros(1, *image_shape(config)))
    return sum(counts)
