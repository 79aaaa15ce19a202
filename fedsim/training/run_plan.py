"""The plan of a LocalSGD run: how many rounds, how many local steps in each, and the learning rate of every step.

Nothing else multiplies by J. Rounds are counted from 1 and local steps from 0: round r takes the steps
``first_step(r)`` to ``first_step(r) + steps(r) - 1`` on every worker. With `local-epochs`, workers that hold fewer
images than others take the first of these steps only: a round is as long as the largest shard makes it. So do slower
`workers` than others.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

from fedsim.config import Config
from fedsim.config.types import MAX_LOCAL_STEPS
from fedsim.data.partition import images_held, shard_sizes
from fedsim.errors import UserError
from fedsim.optim.lr_schedule import Schedule, schedule_of
from fedsim.registry import is_own
from fedsim.training.local_steps import Decisions, LocalSteps, check_local_steps, local_steps_of, local_steps_schedule
from fedsim.training.round_starts import RoundStarts, rounds_decided, rounds_of_number, rounds_of_steps
from fedsim.training.workers import Turns, Workers


@dataclass(frozen=True)
class RunPlan:
    """A pure function of the configuration, the number of training images, and what a schedule of J has `decided`.

    Where J is decided while the run trains, the rounds after the last decision are an estimate: that J stays. An epoch
    is one pass over the images held by clients, by all workers of a round together.
    """

    starts: RoundStarts
    last_round: int  # the round to stop after for now; `rounds` unless the run is to stop early
    batch_size: int  # of each worker
    steps_per_epoch: Fraction
    lr: Schedule
    local_epochs: int = 0  # passes of a worker over its own images in a round; 0: as many steps as every other
    record_by: str = "round"  # unit of rows, tests and checkpoints
    evaluate_every: int = 1  # such units
    evaluate_clients_every: int = 0  # such units; 0: never
    decided: Decisions = ()  # while the run trains
    turns: Turns = field(default_factory=lambda: Turns(Workers(), "even", 0))

    @property
    def rounds(self) -> int:
        """The number of rounds of the whole run."""
        return len(self.starts) - 1

    @property
    def most_rounds(self) -> int:
        """`rounds`, or more where J is decided while the run trains: as many as it has local steps."""
        return self.starts[-1] if self.decided else self.rounds

    def first_step(self, round_: int) -> int:
        """The first local step of a round; of the round after the last one, the number of steps of the run."""
        return self.starts[round_ - 1]

    def steps(self, round_: int) -> int:
        """J: the local steps of each worker in a round; with `local_epochs`, of those that hold most images."""
        return self.starts[round_] - self.starts[round_ - 1]

    @property
    def max_steps(self) -> int:
        """The most local steps that any round has."""
        return self.starts.most_steps

    def samples(self, round_: int, held: int) -> range:
        """Which of the images that a worker reads in the run, pass after pass over the `held` ones, a round takes.

        Its update weighs by their number. A worker that is slower than others trains on the first of them.
        """
        if self.local_epochs:
            return range((round_ - 1) * self.local_epochs * held, round_ * self.local_epochs * held)
        return range(self.first_step(round_) * self.batch_size, self.first_step(round_ + 1) * self.batch_size)

    def steps_of(self, round_: int, worker: int, held: int) -> int:
        """The local steps in a round of a worker that holds so many images; the last batch may be a smaller one."""
        steps = -(-len(self.samples(round_, held)) // self.batch_size)
        return steps if self.turns.workers.alike else self.turns.steps(round_, worker, steps)

    def trained(self, round_: int, worker: int, held: int) -> range:
        """Those of its `samples` that a worker trains on."""
        return self.samples(round_, held)[: self.steps_of(round_, worker, held) * self.batch_size]

    def rates(self, round_: int) -> list[float]:
        """The learning rate of each local step of a round; a worker with fewer steps has the first of them."""
        return [self.lr(step) for step in range(self.first_step(round_), self.first_step(round_ + 1))]

    def epoch(self, round_: int) -> Fraction:
        """The epochs that are done after a round (0: before the first)."""
        return self.first_step(round_ + 1) / self.steps_per_epoch

    def completes(self, round_: int, every: int) -> bool:
        """Whether the end of a round completes another `every` rounds or, recorded by epoch, epochs."""
        if self.record_by == "round":
            return round_ % every == 0
        return self.epoch(round_ - 1) // every < self.epoch(round_) // every

    def is_tested(self, round_: int) -> bool:
        """Whether the model is tested after a round."""
        return round_ == self.rounds or self.completes(round_, self.evaluate_every)

    def tests_clients(self, round_: int) -> bool:
        """Whether models are tested on each client's share of the test data after a round."""
        every = self.evaluate_clients_every
        return every > 0 and (round_ == self.rounds or self.completes(round_, every))


@functools.lru_cache(maxsize=8)  # every client asks in every round, and there may be a million rounds
def run_plan(config: Config, decided: Decisions = ()) -> RunPlan:
    """The plan of `config`; an epoch counts the images that the clients hold by its partition.

    `decided`: what its schedule of J has decided so far.

    Where a node has images of its own, these are not counted.
    """
    workers = config.clients_per_round
    if config.min_clients > workers:
        raise UserError(f"min-clients = {config.min_clients} is more than the {workers} clients of a round: give fewer")
    check_local_steps(config)
    steps_per_epoch = Fraction(images_held(config), workers * config.batch_size)
    if config.local_epochs:
        longest = -(-config.local_epochs * max(shard_sizes(config)) // config.batch_size)
        if longest > MAX_LOCAL_STEPS:
            raise UserError(
                f"local-epochs = {config.local_epochs} are more than {MAX_LOCAL_STEPS:,} local steps: give fewer"
            )
        config = config.model_copy(update={"local_steps": longest})
        steps_per_epoch = Fraction(longest * config.clients, config.local_epochs * workers)

    def schedule(total: int) -> Schedule:
        return schedule_of(config, steps_per_epoch, float(total / steps_per_epoch), workers)

    if local_steps_schedule(config).decides:
        decided = decided or ((0, config.local_steps),)
        total = 0 if config.rounds else _steps_of(steps_per_epoch, config.epochs)
        starts = RoundStarts(rounds_decided(decided, total, config.rounds))
    else:
        starts = _starts(config, steps_per_epoch, schedule)
    stops = [len(starts) - 1]
    if config.stop_after_rounds:
        stops.append(config.stop_after_rounds)
    if config.stop_after_epochs:
        stops.append(max(1, bisect.bisect_left(starts, _steps_of(steps_per_epoch, config.stop_after_epochs))))
    lr = schedule(starts[-1])
    recorded = (config.record_by, config.evaluate_every, config.evaluate_clients_every)
    turns = Turns.of(config)
    for worker in range(config.clients) if is_own(config.workers) else ():  # a trial
        turns.steps(1, worker, starts[1])
        turns.away(1, worker)
    counts = (config.batch_size, steps_per_epoch, lr, config.local_epochs)
    return RunPlan(starts, min(stops), *counts, *recorded, decided, turns)


def _starts(config: Config, steps_per_epoch: Fraction, schedule: Callable[[int], Schedule]) -> RoundStarts:
    """`RunPlan.starts`; `schedule` gives the learning rates of a run of so many steps."""
    if config.local_steps_schedule == "constant":
        whole = config.local_steps if config.local_epochs else 1  # a round of local epochs cannot be cut
        total = config.rounds * config.local_steps or whole * _steps_of(steps_per_epoch / whole, config.epochs)
        return RoundStarts(rounds_of_steps(LocalSteps(lambda step: config.local_steps), total))
    if config.rounds:
        # No rule of a run of so many rounds depends on its number of steps (`check_local_steps`)
        rule = local_steps_of(config, steps_per_epoch, 1, schedule(1))
        starts = RoundStarts(rounds_of_number(rule, config.rounds))
        if starts.most_steps > MAX_LOCAL_STEPS:
            raise UserError(
                f"local-steps-schedule = {config.local_steps_schedule}: some J is more than {MAX_LOCAL_STEPS:,}"
            )
        return starts
    total = _steps_of(steps_per_epoch, config.epochs)
    return RoundStarts(rounds_of_steps(local_steps_of(config, steps_per_epoch, total, schedule(total)), total))


def _steps_of(steps_per_epoch: Fraction, epochs: float) -> int:
    """The local steps of so many epochs: the nearest whole number, at least one."""
    return max(1, round(epochs * steps_per_epoch))
