"""FedNova (Wang, Liu, Liang, Joshi and Poor, NeurIPS 2020): workers that take more steps do not count more."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from strategies.domain import NOT_NEGATIVE, Domain
from strategies.method import Method, ServerRound, State, Tensors, WorkerRound, minus


@dataclass(frozen=True)
class FedNova(Method):
    """x <- x - (sum p_k a_k) sum p_k (x - y_k) / a_k, with the weights p_k of the workers in the mean.

    a_k is how much worker k's gradients count in x - y_k: the sum of the rates of its steps, each times
    1 + m + m^2 + ... with as many terms as steps so far, for a momentum m that is reset in each round.
    """

    needs = ("sgd-of-a-round", "exact-mean", "no-delay")

    def replies(self, sent: Tensors, round_: int, state: State) -> Tensors:
        return {"a": torch.zeros((), dtype=torch.float64)}

    def domains(self, steps: int) -> Mapping[str, Domain]:
        return {"a": NOT_NEGATIVE}

    def end(self, r: WorkerRound, own: Tensors, received: Tensors) -> tuple[Tensors, Tensors]:
        a = normalizer(r.rates(r.round)[: r.steps], r.momentum)
        if a:  # else it has not moved
            r.y = {name: x - (x - r.y[name]) / a for name, x in r.start.items()}
        return {"a": torch.tensor(a, dtype=torch.float64)}, {}

    def update(self, r: ServerRound, state: State, mean: Tensors) -> State:
        moved = minus(r.x, r.next_x)
        r.next_x = {name: x - (mean["a"] * moved[name]).to(x.dtype) for name, x in r.x.items()}
        return state


def normalizer(rates: Sequence[float], momentum: float) -> float:
    """a_k of local steps at such rates."""
    counts = itertools.accumulate(rates, lambda count, _: momentum * count + 1, initial=0.0)
    return sum(rate * count for rate, count in zip(rates, itertools.islice(counts, 1, None), strict=True))
