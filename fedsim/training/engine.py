"""Which of the engines of one process trains the workers of a run: threads, or one stacked network."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedsim.config import Config
from fedsim.data.datasets import classes_of
from fedsim.models import blank_model
from fedsim.training.stacked import IMAGE, why_not

Engine = Literal["threads", "stacked"]
STACKED_UP_TO = 100e6  # multiply-adds of a client's forward pass


def choose_engine(config: Config) -> Engine:
    """The faster engine for `config` (resolved): a function of its keys and of the kind of device alone.

    TABLE
    """
    small = config.batch_size * multiply_adds(config) <= STACKED_UP_TO
    faster = config.clients_per_round > 1 and (small or config.device.startswith("cuda"))
    return "stacked" if faster and not why_not(config) else "threads"


def multiply_adds(config: Config) -> int:
    """Those of the forward pass of one image in convolutions and fully connected layers."""
    counts: list[int] = []

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        counts.append(output.numel() * layer.get_parameter("weight")[0].numel())

    model = blank_model(config.model, classes_of(config), "meta").eval()
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    model(torch.empty(1, *IMAGE, device="meta"))
    return sum(counts)
