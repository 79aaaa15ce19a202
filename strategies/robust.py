"""Means that a few wrong updates cannot move far, in place of the exact mean.

    trimmed   each value's mean without the largest and smallest `trim` of the workers (Yin et al. 2018)
    median    each value's median (Yin et al. 2018)
    clipped   the weighted mean of updates whose norm is cut to the median norm of all workers

They assume that most workers are honest, and cost accuracy where data differ between workers: an honest worker's rare
classes look like an attack. None of them gives privacy, or resists a majority of attackers. Of integers (counters) they
take the median.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from strategies.arguments import at_least, below
from strategies.mean import Mean, Weighted, mean
from strategies.method import Tensors


@dataclass(frozen=True)
class Trimmed(Mean):
    """Each value's unweighted mean without the floor(`trim` * K) largest and smallest."""

    weighted, of_each_value = False, True
    trim: Annotated[float, at_least(0), below(0.5)] = 0.25

    def problem(self, workers: int) -> str:
        least = math.ceil(1000 / workers) / 1000
        of_none = f"trim = {self.trim} of {workers} clients is none: give {least:g} or more"
        return super().problem(workers) or (of_none if trimmed_of(self.trim, workers) == 0 else "")

    @property
    def fewest(self) -> int:
        return next(workers for workers in itertools.count(3) if trimmed_of(self.trim, workers)) if self.trim else 3

    def __call__(self, x: Tensors, parts: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
        return _of_each_value(partial(trimmed_mean, trim=self.trim), x, parts)


@dataclass(frozen=True)
class Median(Mean):
    """Each value's median; the workers' weights do not count."""

    weighted, of_each_value = False, True

    @property
    def fewest(self) -> int:
        return 3

    def __call__(self, x: Tensors, parts: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
        return _of_each_value(median, x, parts)


@dataclass(frozen=True)
class Clipped(Weighted):
    """The weighted mean of models whose distance from `x` is cut to the median distance."""

    @property
    def fewest(self) -> int:
        return 3

    def __call__(self, x: Tensors, parts: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
        floats, medians = _floats(x, parts)
        return medians | mean(clipped(floats, parts), weights)


def _of_each_value(
    combine: Callable[[list[Tensor]], Tensor], x: Tensors, parts: Sequence[Tensors]
) -> dict[str, Tensor]:
    floats, medians = _floats(x, parts)
    return medians | {name: combine([part[name] for part in parts]) for name in floats}


def _floats(x: Tensors, parts: Sequence[Tensors]) -> tuple[Tensors, Tensors]:
    """The tensors in `x` that are no integers, and the medians over `parts` of the others."""
    floats = {name: value for name, value in x.items() if value.is_floating_point()}
    integers = [name for name in x if name not in floats]
    return floats, {name: torch.stack([part[name] for part in parts]).median(0).values for name in integers}


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


def clipped(x: Mapping[str, Tensor], updates: Sequence[Tensors]) -> list[dict[str, Tensor]]:
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
