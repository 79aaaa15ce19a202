"""Robust means, which a few wrong updates cannot move far, in place of LocalSGD's exact mean.

    trimmed   each value's mean without the largest and smallest `trim` of the workers (Yin et al. 2018)
    median    each value's median (Yin et al. 2018)
    clipped   the weighted mean of updates whose norm is cut to the median norm of all workers

They assume that most workers are honest, and cost accuracy where data differ between workers: an honest worker's rare
classes look like an attack. None of them gives privacy, or resists a majority of attackers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from strategies.mean import mean

Tensors = Mapping[str, Tensor]
Mean = Literal["exact", "trimmed", "median", "clipped"]


def combine(
    kind: Mean, x: Tensors, parts: Sequence[Tensors], weights: Sequence[float], trim: float
) -> dict[str, Tensor]:
    """The mean `kind` of each named tensor over `parts`, in their order; `x` is what all of them began from.

    `weights` sum to one; the exact and the clipped mean use them. Of integers (counters) the exact mean takes the
    largest, the others the median.
    """
    if kind == "exact":
        return mean(parts, weights)
    floats = {name: value for name, value in x.items() if value.is_floating_point()}
    integers = {name: torch.stack([part[name] for part in parts]).median(0).values for name in x if name not in floats}
    if kind == "clipped":
        return integers | mean(clipped(floats, parts), weights)
    columns = {name: [part[name] for part in parts] for name in floats}
    if kind == "median":
        return integers | {name: median(column) for name, column in columns.items()}
    return integers | {name: trimmed_mean(column, trim) for name, column in columns.items()}


def trimmed_mean(parts: Sequence[Tensor], trim: float) -> Tensor:
    """The unweighted mean of equally shaped tensors without each value's floor(`trim` * K) largest and smallest."""
    dropped = trimmed_of(trim, len(parts))
    if not 0 <= 2 * dropped < len(parts):
        raise ValueError(f"trim = {trim} leaves none of {len(parts)} workers: give less than 0.5")
    return _mean_between(parts, dropped)


def trimmed_of(trim: float, workers: int) -> int:
    """How many of the largest, and of the smallest, a trimmed mean over so many `workers` leaves out."""
    return int(Fraction(str(trim)) * workers)  # in decimal: 0.29 of 100 is 29


def median(parts: Sequence[Tensor]) -> Tensor:
    """The median of each value; of an even number of workers the mean of the two in the middle."""
    return _mean_between(parts, (len(parts) - 1) // 2)


def _mean_between(parts: Sequence[Tensor], dropped: int) -> Tensor:
    """The mean of each value without the `dropped` largest and smallest, in float64 and then their own precision."""
    ordered = torch.stack(list(parts)).double().sort(0).values
    return ordered[dropped : len(parts) - dropped].mean(0).to(parts[0].dtype)


def clipped(x: Tensors, updates: Sequence[Tensors]) -> list[dict[str, Tensor]]:
    """The models `updates`, whose distances from `x`, over all tensors together, are cut to the median distance."""
    if not x:
        return [{} for _ in updates]
    moves = [{name: update[name].double() - x[name].double() for name in x} for update in updates]
    norms = [torch.stack([move.norm() for move in of_worker.values()]).norm() for of_worker in moves]
    limit = median(norms)
    factors = [torch.where(norm > limit, limit / norm, 1.0) for norm in norms]
    return [
        {name: (x[name].double() + factor * move).to(x[name].dtype) for name, move in of_worker.items()}
        for of_worker, factor in zip(moves, factors, strict=True)
    ]
