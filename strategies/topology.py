"""Who averages with whom: the mixing matrix of each round, of decentralized training (Lian et al. 2017, D-PSGD).

Row k of the matrix W tells which models worker k averages at the end of a round: it begins the next one from
sum_j W_kj y_j. Where W is doubly stochastic, the mean of all models is that of one round of LocalSGD.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from strategies.arguments import at_least, check_fields

Row = Mapping[int, float]  # the weight of each worker that is averaged; a row is divided by the sum of its weights


@dataclass(frozen=True)
class Topology:
    """Each worker averages the models of some; one's own is a frozen dataclass that extends it."""

    one_model: ClassVar[bool] = False  # whether all workers have one model at the end of every round

    def __post_init__(self) -> None:
        check_fields(self)

    def problem(self, workers: int) -> str:
        """Why it has no meaning for so many workers, with the remedy; empty if it has."""
        return ""

    def rows(self, round_: int, workers: int, seed: int) -> Sequence[Row]:
        """The row of each worker in a round, counted from 1; `seed` is for what is drawn at random."""
        raise NotImplementedError


@dataclass(frozen=True)
class All(Topology):
    """Every worker averages the models of all: LocalSGD."""

    one_model = True

    def rows(self, round_: int, workers: int, seed: int) -> Sequence[Row]:
        return [dict.fromkeys(range(workers), 1.0)] * workers


@dataclass(frozen=True)
class Groups(Topology):
    """Workers average within groups of `size`, and in each round that `every` divides all with all.

    Two-level LocalSGD (Lin et al. 2020, hierarchical local SGD). Groups are of consecutive workers; the last one has
    those that are left.
    """

    size: Annotated[int, at_least(1)] = 4
    every: Annotated[int, at_least(1)] = 8

    def problem(self, workers: int) -> str:
        return f"a group of {self.size} needs as many clients, there are {workers}" if self.size > workers else ""

    def rows(self, round_: int, workers: int, seed: int) -> Sequence[Row]:
        size = self.size if round_ % self.every else workers
        first = [worker - worker % size for worker in range(workers)]
        of_group = {at: dict.fromkeys(range(at, min(at + size, workers)), 1.0) for at in set(first)}
        return [of_group[at] for at in first]


@dataclass(frozen=True)
class Pairs(Topology):
    """Two and two average their models, who with whom is drawn in each round; of an odd number one stays alone.

    The pairs of gossip (Boyd et al. 2006) and, with its outer step, of NoLoCo (Kolehmainen et al. 2025).
    """

    def rows(self, round_: int, workers: int, seed: int) -> Sequence[Row]:
        order = list(range(workers))
        random.Random(f"{seed}/{round_}/pairs").shuffle(order)
        pairs = [sorted(order[place : place + 2]) for place in range(0, workers, 2)]
        of_worker = {worker: dict.fromkeys(pair, 1.0) for pair in pairs for worker in pair}
        return [of_worker[worker] for worker in range(workers)]


@dataclass(frozen=True)
class Ring(Topology):
    """Each worker averages its model with those of the two beside it in a ring, a third each (D-PSGD)."""

    def rows(self, round_: int, workers: int, seed: int) -> Sequence[Row]:
        beside = [{(worker + step) % workers for step in (-1, 0, 1)} for worker in range(workers)]
        return [dict.fromkeys(sorted(averaged), 1.0) for averaged in beside]


@dataclass(frozen=True)
class ExponentialGraph(Topology):
    """Worker k averages its model with that of worker k + 2^i, i = 0, 1, ... in turn (SGP: Assran et al. 2019).

    Of K = 2^n workers, n rounds without local steps make all models their mean (Ying et al. 2021, one-peer exponential
    graph). Who receives from k is another worker than the one that it receives from.
    """

    def rows(self, round_: int, workers: int, seed: int) -> Sequence[Row]:
        hops = max(1, (workers - 1).bit_length())
        hop = 2 ** ((round_ - 1) % hops)
        return [dict.fromkeys(sorted({worker, (worker + hop) % workers}), 1.0) for worker in range(workers)]


TOPOLOGIES: dict[str, type[Topology]] = {
    "all": All,
    "groups": Groups,
    "pairs": Pairs,
    "ring": Ring,
    "exponential": ExponentialGraph,
}
