"""The learning rate as a function of the local step: warm-up, then constant, cosine or multi-step.

It does not depend on rounds: LocalSGD with any J and centralized training follow the same schedule over the samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from fedsim.config import Config

Schedule = Callable[[int], float]  # local step, counted from 0 -> learning rate


def schedule_of(config: Config, steps_per_epoch: Fraction, epochs: float, workers: int = 1) -> Schedule:
    """The schedule of `config` over `epochs`.

    With ``lr-scaling-batch`` the rate is scaled by the total batch of all `workers`. With ``schedule-unit`` = epoch the
    rate changes only at the start of an epoch, like PyTorch's schedulers when they are stepped once per epoch; with
    step, at every local step.
    """
    ratio = workers * config.batch_size / config.lr_scaling_batch if config.lr_scaling_batch else 1.0
    peak = config.lr * (math.sqrt(ratio) if config.lr_scaling == "sqrt" else ratio)
    warmup, by_epoch = config.warmup_epochs, config.schedule_unit == "epoch"
    tick = 1.0 if by_epoch else float(1 / steps_per_epoch)

    def lr(step: int) -> float:
        exact = step / steps_per_epoch
        position = int(exact) if by_epoch else float(exact)
        if position < warmup:
            return peak * min(1.0, (position + tick) / warmup)
        if config.schedule == "cosine":
            progress = (position - warmup) / max(epochs - warmup, tick)
            return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        if config.schedule == "multistep":
            return peak * config.gamma ** sum(position >= float(epoch) for epoch in config.milestones.split(","))
        return peak

    return lr
