"""J as a function of training progress: at which local step each round begins.

    constant     J in every round (Stich 2019)
    post-local   1 until an epoch, the first decay of the rate, then J (Lin et al. 2020)
    qsr          the quadratic synchronization rule, max(J, floor((alpha / rate)^2)); J during warm-up (Gu et al. 2024)
    linear       from J to a largest J, in proportion to the steps taken
    doubling     J, 2J, 4J, ... up to a largest J, each for an equal share of the steps
    table        from given epochs on, given numbers of steps; J before the first

Every rule is evaluated where a round begins, with the rate at that step. The last round ends with the run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

LocalSteps = Callable[[int], int]  # the first local step of a round -> how many it takes


def constant(local_steps: int) -> LocalSteps:
    """`local_steps` in every round."""
    return lambda step: local_steps


def post_local(local_steps: int, switch_step: int) -> LocalSteps:
    """One step a round before `switch_step`, then `local_steps`; no round crosses the switch."""
    return lambda step: 1 if step < switch_step else local_steps


def qsr(local_steps: int, alpha: float, rate: Callable[[int], float], warmup_steps: int) -> LocalSteps:
    """Gu et al. 2024, "A Quadratic Synchronization Rule for Distributed Deep Learning"."""

    def steps(step: int) -> int:
        if step < warmup_steps:
            return local_steps
        if rate(step) == 0:
            return 2**62  # the rest of the run
        return max(local_steps, math.floor(min((alpha / rate(step)) ** 2, 2.0**62)))

    return steps


def linear(local_steps: int, largest: int, total: int) -> LocalSteps:
    """From `local_steps` at the start of the `total` steps of the run to `largest` at their end."""
    return lambda step: local_steps + (largest - local_steps) * step // total


def doubling(local_steps: int, largest: int, total: int) -> LocalSteps:
    """`local_steps` times 1, 2, 4, ... as long as that is at most `largest`, each for an equal share of `total`."""
    levels = int(math.log2(largest // local_steps)) + 1
    return lambda step: local_steps * 2 ** (levels * step // total)


def table(local_steps: int, epochs: Sequence[tuple[float, int]], steps_per_epoch: Fraction) -> LocalSteps:
    """`epochs`: pairs, ascending, of an epoch and the steps of each round that begins at or after it."""

    def steps(step: int) -> int:
        reached = [j for epoch, j in epochs if step >= epoch * steps_per_epoch]
        return reached[-1] if reached else local_steps

    return steps


def round_starts(steps: LocalSteps, total: int) -> tuple[int, ...]:
    """The local step at which each round begins, and as the last entry `total`, where the run ends."""
    starts = itertools.accumulate(itertools.repeat(0), lambda start, _: min(total, start + steps(start)))
    return (*itertools.takewhile(lambda start: start < total, starts), total)
