"""J as a function of training progress: at which local step each round begins.

Every rule is evaluated where a round begins, with the rate at that step. The last round ends with the run. Most rules
are known before a run. Others decide on J while it trains, from what the server knows before each round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, NamedTuple, Self

from fedsim.config import FIELDS, Config
from fedsim.config.options import Link
from fedsim.config.types import MAX_LOCAL_STEPS
from fedsim.errors import UserError
from fedsim.network import Network, duration, rate
from fedsim.optim.lr_schedule import shape_of
from fedsim.registry import failures_of, is_own
from strategies.arguments import above, at_least, at_most, below, check_fields, kebab


@dataclass(frozen=True)
class LocalSteps:
    """How many local steps the round takes that begins at a step.

    From one of the ascending `changes` to the next, J only rises or only falls.
    """

    steps_at: Callable[[int], int]
    changes: Sequence[int] = ()

    def __call__(self, step: int) -> int:
        return self.steps_at(step)


class Outline(NamedTuple):
    """What a schedule of J knows of a run."""

    local_steps: int  # the key of this name
    steps_per_epoch: Fraction
    total: int  # local steps of the run
    rate: Callable[[int], float]  # the learning rate of a local step
    warmup_steps: int
    first_decay: float  # the epoch at which the learning rate falls first; 0: none in particular

    def step_at(self, epoch: float) -> int:
        """The first local step at or after an epoch, read as the decimal number that it was given as."""
        return math.ceil(Fraction(str(epoch)) * self.steps_per_epoch)


Decisions = tuple[tuple[int, int], ...]  # from which local step on, which J; the first one from step 0
DecisionState = dict[str, float]


class SoFar(NamedTuple):
    """What the server knows of a run before a round, by which a schedule decides on its J."""

    step: int  # the local step at which the round begins
    local_steps: int  # J as it was decided last; before the first round, the key of this name
    loss: float | None  # the mean training loss of the round before; None before the first one
    sync_seconds: Callable[[Network], float]  # how long the messages of a round take on a network


@dataclass(frozen=True)
class LocalStepsSchedule:
    """How J changes during a run; one's own is a frozen dataclass that extends it.

    It overrides `rule`, where J is known before the run, or else `decide`.
    """

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def needs_length(self) -> bool:
        """Whether the rule depends on the number of steps of the run, which a budget in rounds does not give."""
        return False

    @property
    def uses_rate(self) -> bool:
        """Whether the rule depends on the learning rate."""
        return False

    def of_part(self, part: float) -> Self:
        """The schedule for a run of this part of the budget."""
        return self

    def problem(self, local_steps: int, first_decay: float) -> str:
        """Why it does not go with J at the start, or with the schedule of the rate; empty if it does."""
        return ""

    @property
    def decides(self) -> bool:
        """Whether J is decided while the run trains."""
        return type(self).decide is not LocalStepsSchedule.decide

    def rule(self, run: Outline) -> LocalSteps:
        """J of a round by the local step at which it begins."""
        raise NotImplementedError

    def decide(self, run: Outline, so_far: SoFar, state: DecisionState) -> tuple[int, DecisionState]:
        """J of the next round, and the next `state`, which is {} before the first round; asked once before each.

        Of `run`, `total` is an estimate where the budget is in rounds.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ConstantSteps(LocalStepsSchedule):
    """J (Stich 2019)."""

    def rule(self, run: Outline) -> LocalSteps:
        return LocalSteps(lambda step: run.local_steps)


@dataclass(frozen=True)
class PostLocal(LocalStepsSchedule):
    """One step a round until an epoch (0: the first decay of the rate), then J (Lin et al. 2020)."""

    switch_epoch: Annotated[float, at_least(0), at_most(10**6)] = 0.0

    def problem(self, local_steps: int, first_decay: float) -> str:
        return "" if self.switch_epoch or first_decay else "switch-epoch = 0 needs schedule = multistep: give an epoch"

    def of_part(self, part: float) -> Self:
        return replace(self, switch_epoch=part * self.switch_epoch)

    def rule(self, run: Outline) -> LocalSteps:
        switch_step = run.step_at(self.switch_epoch or run.first_decay)
        return LocalSteps(lambda step: 1 if step < switch_step else run.local_steps)


@dataclass(frozen=True)
class Qsr(LocalStepsSchedule):
    """The quadratic synchronization rule, max(J, floor((alpha / rate)^2)); J during warm-up (Gu et al. 2024)."""

    uses_rate = True
    alpha: Annotated[float, above(0)]

    def rule(self, run: Outline) -> LocalSteps:
        def steps(step: int) -> int:
            if step < run.warmup_steps:
                return run.local_steps
            if run.rate(step) == 0:
                return 2**62  # the rest of the run
            ratio = Fraction(str(self.alpha)) / Fraction(
                f"{run.rate(step):.12g}"
            )  # in decimal: 0.3 / (0.1 * 0.1) is 30
            return max(run.local_steps, min(math.floor(ratio**2), 2**62))

        return LocalSteps(steps, [run.warmup_steps])


@dataclass(frozen=True)
class _UpTo(LocalStepsSchedule):
    max: Annotated[int, at_least(1), at_most(MAX_LOCAL_STEPS)]
    needs_length = True

    def problem(self, local_steps: int, first_decay: float) -> str:
        return f"max is less than local-steps = {local_steps}: give more" if self.max < local_steps else ""


@dataclass(frozen=True)
class LinearSteps(_UpTo):
    """From J at the start of the run to `max` at its end, in proportion to the steps taken."""

    def rule(self, run: Outline) -> LocalSteps:
        first, more = run.local_steps, self.max - run.local_steps
        return LocalSteps(lambda step: first + more * step // run.total)


@dataclass(frozen=True)
class Doubling(_UpTo):
    """J, 2 J, 4 J, ... as long as that is at most `max`, each for an equal share of the steps."""

    def rule(self, run: Outline) -> LocalSteps:
        levels = int(math.log2(self.max // run.local_steps)) + 1
        return LocalSteps(lambda step: run.local_steps * 2 ** (levels * step // run.total))


@dataclass(frozen=True)
class Table(LocalStepsSchedule):
    """From each of the ascending `epochs` on the `steps` in its place; J before the first."""

    epochs: Annotated[tuple[float, ...], above(0)]
    steps: Annotated[tuple[int, ...], at_least(1), at_most(MAX_LOCAL_STEPS)]

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.epochs) != sorted(set(self.epochs)) or len(self.epochs) != len(self.steps):
            raise ValueError("epochs must be ascending, with as many steps, for instance table:epochs=10/50,steps=1/16")

    def of_part(self, part: float) -> Self:
        return replace(self, epochs=tuple(part * epoch for epoch in self.epochs))

    def rule(self, run: Outline) -> LocalSteps:
        starts = [(run.step_at(epoch), j) for epoch, j in zip(self.epochs, self.steps, strict=True)]

        def steps(step: int) -> int:
            reached = [j for start, j in starts if step >= start]
            return reached[-1] if reached else run.local_steps

        return LocalSteps(steps, [start for start, _ in starts])


@dataclass(frozen=True)
class AdaComm(LocalStepsSchedule):
    """AdaComm (Wang and Joshi, MLSys 2019): J, then ceil(J sqrt(F / F_1)) `every` so many epochs, if that is less.

    F is the training loss of the last round, and F_1 that of the first one. Where it is not less, J shrinks by the
    factor `shrink`, upwards rounded.
    """

    every: Annotated[float, above(0), at_most(10**6)] = 1.0
    shrink: Annotated[float, above(0), at_most(1)] = 1.0

    def of_part(self, part: float) -> Self:
        return replace(self, every=part * self.every)

    def decide(self, run: Outline, so_far: SoFar, state: DecisionState) -> tuple[int, DecisionState]:
        if so_far.loss is None:
            return run.local_steps, {}
        interval = so_far.step // (Fraction(str(self.every)) * run.steps_per_epoch)
        first = state.get("first_loss", so_far.loss)
        if interval > state.get("interval", 0):
            found = math.ceil(run.local_steps * math.sqrt(so_far.loss / first)) if first else run.local_steps
            shrunk = math.ceil(self.shrink * so_far.local_steps)
            so_far = so_far._replace(local_steps=max(1, found if found < so_far.local_steps else shrunk))
        return so_far.local_steps, {"first_loss": first, "interval": interval}


@dataclass(frozen=True)
class NetworkSteps(LocalStepsSchedule):
    """The least J with which messages take at most a `share` of the time of a round, at least `local-steps`.

    The network has the `bandwidth`, `latency`, `link` and `upload` (default: the bandwidth) of `fedsim
    time-to-accuracy`; a local step takes the time `step`.
    """

    bandwidth: str
    step: str
    latency: str = "0ms"
    link: Link = "worker"
    upload: str = ""
    share: Annotated[float, above(0), below(1)] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._network, self._step_seconds

    @property
    def _network(self) -> Network:
        upload = rate("upload", self.upload) if self.upload else 0.0
        return Network(
            rate("bandwidth", self.bandwidth), duration("latency", self.latency, zero=True), self.link, upload
        )

    @property
    def _step_seconds(self) -> float:
        return duration("step", self.step)

    def decide(self, run: Outline, so_far: SoFar, state: DecisionState) -> tuple[int, DecisionState]:
        if state:  # messages do not change, and to count their bytes takes a model
            return int(state["steps"]), state
        most = self.share / (1 - self.share) * self._step_seconds  # of a sync, for each local step
        steps = max(run.local_steps, math.ceil(so_far.sync_seconds(self._network) / most))
        return steps, {"steps": steps}


SCHEDULES: dict[str, type[LocalStepsSchedule]] = {
    "constant": ConstantSteps,
    "post-local": PostLocal,
    "qsr": Qsr,
    "linear": LinearSteps,
    "doubling": Doubling,
    "table": Table,
    "adacomm": AdaComm,
    "network": NetworkSteps,
}


def local_steps_schedule(config: Config) -> LocalStepsSchedule:
    """The schedule of J of `config`; raises UserError where it cannot be made."""
    schedule: LocalStepsSchedule = config.made("local_steps_schedule")
    return schedule


def local_steps_of(config: Config, steps_per_epoch: Fraction, total: int, rate: Callable[[int], float]) -> LocalSteps:
    """The rule of `config` for a run of `total` steps with the learning rate `rate`."""
    run = outline_of(config, steps_per_epoch, total, rate)
    if not is_own(config.local_steps_schedule):
        return local_steps_schedule(config).rule(run)
    what = f"local-steps-schedule = {config.local_steps_schedule}"
    with failures_of(f"{what} fails"):
        rule = local_steps_schedule(config).rule(run)

    def steps(step: int) -> int:
        with failures_of(f"{what} fails"):
            found = rule(step)
        if type(found) is not int or found < 1:
            raise UserError(f"{what} gives J = {found} at step {step}: it must be a whole number from 1 on")
        return found

    return LocalSteps(steps, rule.changes)


def outline_of(config: Config, steps_per_epoch: Fraction, total: int, rate: Callable[[int], float]) -> Outline:
    """What a schedule knows of a run of `total` steps with the learning rate `rate`."""
    run = Outline(config.local_steps, steps_per_epoch, total, rate, 0, shape_of(config).first_decay)
    return run._replace(warmup_steps=run.step_at(config.warmup_epochs))


def decided_steps(config: Config, run: Outline, so_far: SoFar, state: DecisionState) -> tuple[int, DecisionState]:
    """What the schedule of `config`, which decides on J, decides before a round."""
    what = f"local-steps-schedule = {config.local_steps_schedule}"
    with failures_of(f"{what} fails"):
        found, state = local_steps_schedule(config).decide(run, so_far, state)
    if type(found) is not int or not 1 <= found <= MAX_LOCAL_STEPS:
        raise UserError(
            f"{what} decides on J = {found} at step {so_far.step}: it must be a whole number from 1 to "
            f"{MAX_LOCAL_STEPS:,}"
        )
    if not all(type(key) is str and isinstance(value, int | float) for key, value in state.items()):
        raise UserError(f"{what} remembers {state}: a state must be a dict of numbers by name")
    return found, {key: float(value) for key, value in state.items()}


def check_local_steps(config: Config) -> None:
    """Raise UserError where the schedule of J does not go with other keys."""
    schedule, shape = local_steps_schedule(config), shape_of(config)
    what = f"local-steps-schedule = {config.local_steps_schedule}"
    for name in ("local_steps", "local_steps_schedule") if config.local_epochs else ():
        if (value := getattr(config, name)) != FIELDS[name].default:
            raise UserError(
                f"{kebab(name)} = {value} is not used with local-epochs = {config.local_epochs}: leave one of them out"
            )
    if problem := schedule.problem(config.local_steps, shape.first_decay):
        raise UserError(f"{what}: {problem}")
    if config.local_steps_schedule != "constant" and config.record_by == "round":
        raise UserError(f"{what} makes rounds of unequal length: give --record-by epoch")
    from_rate = schedule.uses_rate or schedule.decides  # with the number of steps the rates would be decided too
    if config.rounds and (schedule.needs_length or (from_rate and shape.needs_length)):
        raise UserError(f"rounds = {config.rounds}: {what} needs the budget in --epochs")
