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

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from fedsim.config import FIELDS, Config, check_used, kebab, table_of
from fedsim.errors import UserError

USED_BY = {  # key -> the schedules that use it
    "local_steps_max": ("linear", "doubling"),
    "qsr_alpha": ("qsr",),
    "switch_epoch": ("post-local",),
    "local_steps_table": ("table",),
}


@dataclass(frozen=True)
class LocalSteps:
    """How many local steps the round takes that begins at a step.

    From one of the ascending `changes` to the next, J only rises or only falls.
    """

    steps_at: Callable[[int], int]
    changes: Sequence[int] = ()

    def __call__(self, step: int) -> int:
        return self.steps_at(step)


def local_steps_of(config: Config, steps_per_epoch: Fraction, total: int, rate: Callable[[int], float]) -> LocalSteps:
    """The rule of `config` for a run of `total` steps with the learning rate `rate`."""
    least, largest = config.local_steps, config.local_steps_max
    match config.local_steps_schedule:
        case "post-local":
            return post_local(least, _step_at(_switch_epoch(config), steps_per_epoch))
        case "qsr":
            return qsr(least, config.qsr_alpha, rate, _step_at(config.warmup_epochs, steps_per_epoch))
        case "linear":
            return linear(least, largest, total)
        case "doubling":
            return doubling(least, largest, total)
        case _:  # a constant J needs no rule
            return table(least, table_of(config.local_steps_table), steps_per_epoch)


def check_local_steps(config: Config) -> None:
    """Raise UserError where the schedule of J lacks a key, or a key is given that it does not use."""
    schedule = config.local_steps_schedule
    check_used(config, "local_steps_schedule", USED_BY)
    for name in ("local_steps", "local_steps_schedule") if config.local_epochs else ():
        if (value := getattr(config, name)) != FIELDS[name].default:
            raise UserError(
                f"{kebab(name)} = {value} is not used with local-epochs = {config.local_epochs}: leave one of them out"
            )
    if schedule in USED_BY["local_steps_max"] and config.local_steps_max < config.local_steps:
        raise UserError(
            f"local-steps-max = {config.local_steps_max} is less than local-steps = {config.local_steps}: give more"
        )
    if schedule == "qsr" and not config.qsr_alpha:
        raise UserError("qsr-alpha = 0: local-steps-schedule = qsr needs it, for instance --qsr-alpha 0.02")
    if schedule == "table" and not config.local_steps_table:
        raise UserError("local-steps-table is empty: local-steps-schedule = table needs it, for instance 10:1,50:16")
    if schedule == "post-local" and not _switch_epoch(config):
        raise UserError("switch-epoch = 0: local-steps-schedule = post-local needs it, or schedule = multistep")
    if schedule != "constant" and config.record_by == "round":
        raise UserError(f"local-steps-schedule = {schedule} makes rounds of unequal length: give --record-by epoch")
    needs_total = schedule in ("linear", "doubling") or (schedule == "qsr" and config.schedule == "cosine")
    if config.rounds and needs_total:
        raise UserError(f"rounds = {config.rounds}: local-steps-schedule = {schedule} needs the budget in --epochs")


def _step_at(epoch: float, steps_per_epoch: Fraction) -> int:
    """The first local step at or after an epoch, read as the decimal number that it was given as."""
    return math.ceil(Fraction(str(epoch)) * steps_per_epoch)


def _switch_epoch(config: Config) -> float:
    first = config.milestones.split(",")[0] if config.schedule == "multistep" else ""
    return config.switch_epoch or float(first or 0)


def post_local(local_steps: int, switch_step: int) -> LocalSteps:
    """One step a round before `switch_step`, then `local_steps`; no round crosses the switch."""
    return LocalSteps(lambda step: 1 if step < switch_step else local_steps)


def qsr(local_steps: int, alpha: float, rate: Callable[[int], float], warmup_steps: int) -> LocalSteps:
    """Gu et al. 2024, "A Quadratic Synchronization Rule for Distributed Deep Learning"."""

    def steps(step: int) -> int:
        if step < warmup_steps:
            return local_steps
        if rate(step) == 0:
            return 2**62  # the rest of the run
        ratio = Fraction(str(alpha)) / Fraction(f"{rate(step):.12g}")  # in decimal: 0.3 / (0.1 * 0.1) is 30
        return max(local_steps, min(math.floor(ratio**2), 2**62))

    return LocalSteps(steps, [warmup_steps])


def linear(local_steps: int, largest: int, total: int) -> LocalSteps:
    """From `local_steps` at the start of the `total` steps of the run to `largest` at their end."""
    return LocalSteps(lambda step: local_steps + (largest - local_steps) * step // total)


def doubling(local_steps: int, largest: int, total: int) -> LocalSteps:
    """`local_steps` times 1, 2, 4, ... as long as that is at most `largest`, each for an equal share of `total`."""
    levels = int(math.log2(largest // local_steps)) + 1
    return LocalSteps(lambda step: local_steps * 2 ** (levels * step // total))


def table(local_steps: int, epochs: Sequence[tuple[float, int]], steps_per_epoch: Fraction) -> LocalSteps:
    """`epochs`: pairs, ascending, of an epoch and the steps of each round that begins at or after it."""

    starts = [(_step_at(epoch, steps_per_epoch), j) for epoch, j in epochs]

    def steps(step: int) -> int:
        reached = [j for start, j in starts if step >= start]
        return reached[-1] if reached else local_steps

    return LocalSteps(steps, [start for start, _ in starts])
