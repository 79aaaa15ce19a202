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

    With `unit` = epoch the rate changes only at the start of an epoch, like PyTorch's schedulers when they are stepped
    once per epoch; with step, at every local step.
    """

    peak: float
    shape: str
    unit: str
    warmup: float
    epochs: float
    milestones: tuple[float, ...]
    gamma: float
    steps_per_epoch: Fraction

    def __call__(self, step: int) -> float:
        """The learning rate of local step `step`, counted from 0."""
        exact = Fraction(step) / self.steps_per_epoch
        position, tick = (int(exact), 1.0) if self.unit == "epoch" else (float(exact), float(1 / self.steps_per_epoch))
        if position < self.warmup:
            return self.peak * min(1.0, (position + tick) / self.warmup)
        if self.shape == "cosine":
            progress = (position - self.warmup) / max(self.epochs - self.warmup, tick)
            return self.peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        if self.shape == "multistep":
            return self.peak * self.gamma ** sum(position >= milestone for milestone in self.milestones)
        return self.peak


def schedule_of(config: Config, steps_per_epoch: Fraction, epochs: float, workers: int = 1) -> Schedule:
    """The schedule of `config`; with ``lr-scaling-batch`` the rate is scaled by the total batch of all `workers`."""
    ratio = workers * config.batch_size / config.lr_scaling_batch if config.lr_scaling_batch else 1.0
    scale = math.sqrt(ratio) if config.lr_scaling == "sqrt" else ratio
    return Schedule(
        peak=config.lr * scale,
        shape=config.schedule,
        unit=config.schedule_unit,
        warmup=config.warmup_epochs,
        epochs=epochs,
        milestones=tuple(float(part) for part in config.milestones.split(",") if part),
        gamma=config.gamma,
        steps_per_epoch=steps_per_epoch,
    )
