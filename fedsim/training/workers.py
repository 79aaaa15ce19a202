"""Workers that are not alike: how many of a round's local steps each takes, and in which rounds it is away.

In a round of J local steps a worker of speed 1 takes J of them, and a slower one as many as it gets done in that time,
the first ones of the round. A worker that is away in a round is not sent its message, as if it had not been sampled.
Both are functions of the seed, the round and the worker: server and clients know them without a message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.registry import failures_of
from fedsim.rng import generator
from strategies.arguments import above, at_least, at_most, below, check_fields


class Turn(NamedTuple):
    """A worker in a round, for which it is asked what the worker does."""

    worker: int
    round: int
    local_steps: int  # those of a worker that takes all
    seed: int

    def draws(self) -> np.random.Generator:
        """Random numbers of this worker in this round."""
        return generator(self.seed, self.worker, self.round, "workers")

    def draws_of_run(self) -> np.random.Generator:
        """Random numbers of this worker, the same in every round."""
        return generator(self.seed, self.worker, 0, "workers")


@dataclass(frozen=True)
class Workers:
    """Workers that take all local steps of every round; one's own is a frozen dataclass that extends it."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def alike(self) -> bool:
        """Whether every worker takes all steps."""
        return type(self).steps is Workers.steps

    @property
    def always_there(self) -> bool:
        """Whether no worker is ever away."""
        return type(self).is_away is Workers.is_away

    def steps(self, turn: Turn) -> int:
        """How many of the local steps of a round a worker takes: from 1 to all."""
        return turn.local_steps

    def is_away(self, turn: Turn) -> bool:
        """Whether a worker is away in a round."""
        return False


@dataclass(frozen=True)
class Uneven(Workers):
    """A worker's speed is drawn between two bounds, once or, if it `varies`, in each round; at times it is `away`.

    It takes the nearest whole number to its speed times J, at least one step.
    """

    speed: Annotated[tuple[float, float], above(0), at_most(1)] = (1.0, 1.0)
    away: Annotated[float, at_least(0), below(1)] = 0.0  # the probability, in each round
    varies: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.speed[0] > self.speed[1]:
            raise ValueError("speed must be ascending, for instance speed=0.5/1")

    @property
    def alike(self) -> bool:
        return self.speed == (1.0, 1.0)

    @property
    def always_there(self) -> bool:
        return self.away == 0

    def steps(self, turn: Turn) -> int:
        slowest, fastest = self.speed
        drawn = turn.draws().random(2)[1] if self.varies else turn.draws_of_run().random()
        return max(1, round((slowest + (fastest - slowest) * drawn) * turn.local_steps))

    def is_away(self, turn: Turn) -> bool:
        return bool(turn.draws().random() < self.away)


def workers_of(config: Config) -> Workers:
    """The workers of `config`; raises UserError where they cannot be made."""
    workers: Workers = config.made("workers")
    return workers


def everyone(config: Config) -> bool:
    """Whether all workers take part in every round."""
    return config.clients_per_round == config.clients and workers_of(config).always_there


@dataclass(frozen=True)
class Turns:
    """What the `workers` of a run do in its rounds; raises UserError where one's own do what they cannot."""

    workers: Workers
    name: str  # of the key's value, for errors
    seed: int

    @classmethod
    def of(cls, config: Config) -> Turns:
        return cls(workers_of(config), config.workers, config.seed)

    def steps(self, round_: int, worker: int, local_steps: int) -> int:
        """How many of the local steps of a round a worker takes."""
        with failures_of(f"workers = {self.name} fails"):
            found = self.workers.steps(Turn(worker, round_, local_steps, self.seed))
        if type(found) is not int or not 1 <= found <= local_steps:
            raise UserError(
                f"workers = {self.name} gives {found} steps to worker {worker} in round {round_}: it must be a whole "
                f"number from 1 to {local_steps}"
            )
        return found

    def away(self, round_: int, worker: int) -> bool:
        """Whether a worker is away in a round."""
        with failures_of(f"workers = {self.name} fails"):
            return bool(self.workers.is_away(Turn(worker, round_, 1, self.seed)))


WORKERS: dict[str, type[Workers]] = {"even": Workers, "uneven": Uneven}
