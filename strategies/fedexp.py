"""FedExP (Jhunjhunwala, Wang and Joshi, ICLR 2023): an outer step that is the longer, the less the workers agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from strategies.arguments import at_least
from strategies.mean import weighted_means
from strategies.method import Method, ServerRound, State, Tensors, minus


@dataclass(frozen=True)
class FedExP(Method):
    """x <- x - max(1, mean ||d_k||^2 / (2 (||d||^2 + eps))) d, where d_k = x - y_k and d is their mean.

    Where another layer has changed the mean, as FedNova does, its factor is that of what the workers sent.
    The paper tests the mean of the last two x; here x itself is tested.
    """

    eps: Annotated[float, at_least(0)] = 1e-3
    needs = ("exact-mean",)

    def update(self, r: ServerRound, state: State, mean: Tensors) -> State:
        moves = [r.moved(worker) for worker in r.updates]
        squares = [weight * squared_norm(move) for move, weight in zip(moves, r.weights, strict=True)]
        lr = torch.stack(squares).sum() / (2 * (squared_norm(weighted(moves, r.weights)) + self.eps))
        lr = lr.nan_to_num(nan=1.0).clamp(min=1)  # 0 / 0: no worker has moved
        moved = minus(r.x, r.next_x)
        r.next_x = {name: x - (lr * moved[name]).to(x.dtype) for name, x in r.x.items()}
        return state


def weighted(parts: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    """The weighted mean of each tensor."""
    names = parts[0].keys()
    return dict(zip(names, weighted_means([[part[name] for name in names] for part in parts], weights), strict=True))


def squared_norm(tensors: Tensors) -> Tensor:
    """The sum of the squares of all values, in float64."""
    return torch.stack([tensor.double().square().sum() for tensor in tensors.values()]).sum()
