"""How far the workers of a round have moved, and how alike: what papers on LocalSGD call client drift."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from strategies.method import ServerRound, Tensors


def drift(r: ServerRound) -> dict[str, float]:
    """The drift of the updates of a round, d_k = x - y_k as they were averaged, with weights p_k.

    `update-norm`: the norm of their mean, ||sum p_k d_k||. `update-cosine`: the mean cosine between two of them, of
    those that are not zero; left out where there are not two. `update-spread`: the standard deviation of their norms,
    divided by the mean of these; left out where all are zero.

    The mean cosine needs no products of pairs: of n vectors of norm 1 it is (||their sum||^2 - n) / (n (n - 1)). Three
    tensors of the size of the model are held at a time, in float64.
    """
    norms = torch.stack([vector_of(r.moved(worker)).norm() for worker in r.updates])
    moved, lengths = int(norms.count_nonzero()), torch.where(norms > 0, norms, 1)
    mean, directions = torch.zeros(2, 1, dtype=torch.float64, device=norms.device)
    for worker, weight, length in zip(r.updates, r.weights, lengths, strict=True):
        vector = vector_of(r.moved(worker))
        mean = mean + weight * vector
        directions = directions + vector / length
    found = {"update-norm": float(mean.norm())}
    if moved > 1:
        found["update-cosine"] = (float(directions.square().sum()) - moved) / (moved * (moved - 1))
    if moved:
        found["update-spread"] = float(norms.std(correction=0) / norms.mean())
    return {name: value for name, value in found.items() if math.isfinite(value)}


def vector_of(tensors: Tensors) -> Tensor:
    """All values of `tensors` in float64, in an order that does not depend on how they lie in memory."""
    return torch.cat([tensor.reshape(-1).double() for tensor in tensors.values()])
