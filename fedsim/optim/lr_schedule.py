"""The learning rate as a function of the local step: warm-up, then a shape: constant, cosine, multi-step, or one's own.

It does not depend on rounds: LocalSGD with any J and centralized training follow the same schedule over the samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, Self

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.registry import failures_of, is_own
from strategies.arguments import above, at_least, check_fields

TRIED = 10  # points of a run at which a schedule of the user's own is tried
Schedule = Callable[[int], float]  # local step, counted from 0 -> learning rate


@dataclass(frozen=True)
class Shape:
    """The rate after the warm-up, as a factor of its peak; one's own is a frozen dataclass that extends it."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def first_decay(self) -> float:
        """The epoch at which the rate falls first; 0: none in particular."""
        return 0.0

    @property
    def needs_length(self) -> bool:
        """Whether the factor depends on `progress`, and so on the length of the run."""
        return True

    def of_part(self, part: float) -> Self:
        """The shape for a run of this part of the budget."""
        return self

    def factor(self, epoch: float, progress: float) -> float:
        """The factor after `epoch` epochs; `progress` goes from 0 at the end of the warm-up to 1 at that of the run."""
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Shape):
    """The peak."""

    needs_length = False

    def factor(self, epoch: float, progress: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Cosine(Shape):
    """Half a cosine from the peak to 0 (Loshchilov and Hutter 2017)."""

    def factor(self, epoch: float, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@dataclass(frozen=True)
class Multistep(Shape):
    """Times `gamma` at each of the `milestones`, which are ascending epochs."""

    needs_length = False
    milestones: Annotated[tuple[float, ...], above(0)]
    gamma: Annotated[float, above(0)] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("milestones must be ascending, for instance milestones=50/60")

    @property
    def first_decay(self) -> float:
        return self.milestones[0]

    def of_part(self, part: float) -> Self:
        return replace(self, milestones=tuple(part * epoch for epoch in self.milestones))

    def factor(self, epoch: float, progress: float) -> float:
        return self.gamma ** sum(epoch >= milestone for milestone in self.milestones)


SCHEDULES: dict[str, type[Shape]] = {"constant": Constant, "cosine": Cosine, "multistep": Multistep}


def linear(total: float, batch: Annotated[int, at_least(1)]) -> float:
    """The ratio of the total batch to `batch` (Goyal et al. 2017)."""
    return total / batch


def sqrt(total: float, batch: Annotated[int, at_least(1)]) -> float:
    """The root of the ratio of the total batch to `batch` (Krizhevsky 2014)."""
    return math.sqrt(total / batch)


SCALINGS: dict[str, Callable[..., float]] = {"linear": linear, "sqrt": sqrt}


def shape_of(config: Config) -> Shape:
    """The shape of the schedule of `config`; raises UserError where it cannot be made."""
    shape: Shape = config.made("schedule")
    return shape


def check_shape(config: Config) -> None:
    """Raise UserError where a schedule of the user's own fails, or gives no rate."""
    if not is_own(config.schedule):
        return
    shape, what = shape_of(config), f"schedule = {config.schedule}"
    for progress in (number / TRIED for number in range(TRIED + 1)):
        with failures_of(f"{what} fails"):
            factor = shape.factor(config.epochs * progress, progress)
        if not isinstance(factor, int | float) or not 0 <= factor < math.inf:
            raise UserError(
                f"{what} gives the factor {factor} at {progress:.0%} of a run: it must be a number from 0 on"
            )


def schedule_of(config: Config, steps_per_epoch: Fraction, epochs: float, workers: int = 1) -> Schedule:
    """The schedule of `config` over `epochs`.

    With ``lr-scaling`` the rate is scaled by the total batch of all `workers`. With ``schedule-unit`` = epoch the rate
    changes only at the start of an epoch, like PyTorch's schedulers when they are stepped once per epoch; with step, at
    every local step.
    """
    peak = config.lr
    for scaling in config.choices("lr_scaling"):
        peak *= scaling.make(workers * config.batch_size)
    shape, warmup, by_epoch = shape_of(config), config.warmup_epochs, config.schedule_unit == "epoch"
    tick = 1.0 if by_epoch else float(1 / steps_per_epoch)

    def lr(step: int) -> float:
        exact = step / steps_per_epoch
        position = int(exact) if by_epoch else float(exact)
        if position < warmup:
            return peak * min(1.0, (position + tick) / warmup)
        return peak * shape.factor(position, (position - warmup) / max(epochs - warmup, tick))

    return lr
