"""The state of the local optimizer at a sync, for SGDM its momentum: kept by each worker, reset, or averaged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from strategies.arguments import at_least, at_most
from strategies.method import Method, ServerRound, State, Tensors, WorkerRound, Zeros

# Entries of optimizers' states that are averages, sums or maxima of squares and magnitudes: none is negative
SECOND_MOMENTS = (
    *("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf"),
    *("row_var", "col_var", "variance"),
)


@dataclass(frozen=True)
class Keep(Method):
    """Each worker keeps its own (Lin et al. 2020, "Don't Use Large Mini-Batches, Use Local SGD", local momentum)."""

    def keeps(self, zero: Zeros) -> Tensors:
        return zero.optimizer

    def begin(self, r: WorkerRound, own: Tensors, received: Tensors) -> None:
        r.optimizer = own

    def end(self, r: WorkerRound, own: Tensors, received: Tensors) -> tuple[Tensors, Tensors]:
        return {}, r.optimizer


@dataclass(frozen=True)
class Reset(Method):
    """Each round begins with a new optimizer: the layer does nothing."""


@dataclass(frozen=True)
class Average(Method):
    """It is averaged as the parameters are (Yu, Jin and Yang 2019), or less often.

    Second moments are averaged in each round that `second_moments` divides, all else in each that `momentum` divides.
    A worker keeps what is averaged less often (DES-LOC: Iacob et al. 2025, arXiv 2505.22549, with 3 and 6).
    """

    momentum: Annotated[int, at_least(1), at_most(100)] = 1
    second_moments: Annotated[int, at_least(1), at_most(100)] = 1
    reads_message = True
    one_model = False

    @property
    def needs(self) -> tuple[str, ...]:
        return ("second-moments",) if self.second_moments > 1 else ()

    @property
    def keeps_memory(self) -> bool:
        return self.period > 1

    @property
    def period(self) -> int:
        return math.lcm(self.momentum, self.second_moments)

    def initial(self, zero: Zeros) -> State:
        return dict(zero.optimizer)

    def keeps(self, zero: Zeros) -> Tensors:
        return self._own(zero.optimizer)

    def send(self, r: ServerRound, state: State, worker: int) -> Tensors:
        return self._averaged(r.round - 1, state)

    def begin(self, r: WorkerRound, own: Tensors, received: Tensors) -> None:
        r.optimizer = {**own, **received}

    def replies(self, sent: Tensors, round_: int, state: State) -> Tensors:
        return self._averaged(round_, state)

    def end(self, r: WorkerRound, own: Tensors, received: Tensors) -> tuple[Tensors, Tensors]:
        return self._averaged(r.round, r.optimizer), self._own(r.optimizer)

    def update(self, r: ServerRound, state: State, mean: Tensors) -> State:
        return {**state, **mean}

    def _averaged(self, round_: int, entries: Mapping[str, Tensor]) -> Tensors:
        """Those that are averaged at the end of a round."""
        return {name: value for name, value in entries.items() if round_ % self._every(name) == 0}

    def _own(self, entries: Mapping[str, Tensor]) -> Tensors:
        """Those that are averaged in some rounds only."""
        return {name: value for name, value in entries.items() if self._every(name) > 1}

    def _every(self, name: str) -> int:
        return self.second_moments if is_second_moment(name) else self.momentum


def is_second_moment(name: str) -> bool:
    """Whether this entry of an optimizer's state holds second moments."""
    return name.rpartition("/")[2] in SECOND_MOMENTS


MOMENTUM: dict[str, type[Method]] = {"keep": Keep, "reset": Reset, "average": Average}
