"""The learning rate as a function of the local step: warm-up, then constant, cosine or multi-step.

It does not depend on rounds: LocalSGD with any J and centralized training follow the same schedule over the samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from fedsim.config import Config


@dataclass(frozen=True)
class Schedule:
    """lr(step) for step = 0, 1, ... of `steps_per_epoch` * `epochs` local steps.

    With `schedule_unit` = epoch the rate changes only at the start of an epoch, like PyTorch's schedulers when they are
    stepped once per epoch; with step, at every local step.
    """

    config: Config
    peak: float
    epochs: float
    steps_per_epoch: Fraction

    def __call__(self, step: int) -> float:
        """The learning rate of local step `step`, counted from 0."""
        config, exact, warmup = self.config, Fraction(step) / self.steps_per_epoch, self.config.warmup_epochs
        by_epoch = config.schedule_unit == "epoch"
        position, tick = (int(exact), 1.0) if by_epoch else (float(exact), float(1 / self.steps_per_epoch))
        if position < warmup:
            return self.peak * min(1.0, (position + tick) / warmup)
        if config.schedule == "cosine":
            progress = (position - warmup) / max(self.epochs - warmup, tick)
            return self.peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        if config.schedule == "multistep":
            return self.peak * config.gamma ** sum(position >= float(m) for m in config.milestones.split(","))
        return self.peak


def schedule_of(config: Config, steps_per_epoch: Fraction, epochs: float, workers: int = 1) -> Schedule:
    """The schedule of `config`; with ``lr-scaling-batch`` the rate is scaled by the total batch of all `workers`."""
    ratio = workers * config.batch_size / config.lr_scaling_batch if config.lr_scaling_batch else 1.0
    scale = math.sqrt(ratio) if config.lr_scaling == "sqrt" else ratio
    return Schedule(config, config.lr * scale, epochs, steps_per_epoch)
