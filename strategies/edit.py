"""EDiT's mean (Cheng et al., ICLR 2025, arXiv 2412.07210), as in the authors' code, which calls it a penalty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from strategies.arguments import above, at_least, at_most
from strategies.mean import Mean, mean, weighted_mean
from strategies.method import ServerRound, State, Tensors

AVERAGE, VARIANCE, COUNT = range(3)  # columns of what is remembered of a parameter: of the norms of each worker


@dataclass(frozen=True)
class Edit(Mean):
    """Updates that are unlike a worker's earlier ones are dropped, small ones count more, and the mean is clipped.

    Each parameter is treated by itself. An update is dropped where its norm is more than `threshold` standard
    deviations above the moving average of its worker's norms, which takes on each with the weight `alpha`, and is known
    after `warmup` updates. Those left weigh exp(-norm / `temperature`), times the weights of their workers. The norm of
    the mean update of all parameters is cut to `clip`. Of buffers, and what layers reply, it is the exact mean.
    """

    threshold: Annotated[float, above(0)] = 3.0
    alpha: Annotated[float, above(0), at_most(1)] = 0.02
    warmup: Annotated[int, at_least(1)] = 120
    temperature: Annotated[float, above(0)] = 1.0
    clip: Annotated[float, above(0)] = 10.0

    def __call__(self, x: Tensors, parts: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
        return mean(parts, weights)

    def of_models(self, r: ServerRound, x: Tensors, state: State) -> tuple[Tensors, State]:
        workers, parts = list(r.updates), [update.parameters for update in r.updates.values()]
        norms = torch.stack([torch.stack([(x[n] - part[n]).double().norm() for part in parts]) for n in x]).cpu()
        averaged, after = Tensors(), dict(state)
        for name, of_parameter in zip(x, norms, strict=True):
            seen = _rows(state.get(name), max(workers) + 1)
            dropped = self._dropped(seen[workers], of_parameter)
            seen[workers] = torch.where(dropped[:, None], seen[workers], self._updated(seen[workers], of_parameter))
            after[name] = seen
            factors = torch.exp((of_parameter.min() - of_parameter) / self.temperature)
            weights = (torch.tensor(r.weights, dtype=torch.float64) * factors).masked_fill(dropped, 0)
            if weights.sum():
                of_workers = [part[name] for part in parts]
                averaged[name] = weighted_mean(*_those_with_weight(of_workers, (weights / weights.sum()).tolist()))
            else:
                averaged[name] = x[name]
        return self._clipped(x, averaged), after

    def _dropped(self, seen: Tensor, norms: Tensor) -> Tensor:
        """Whether the norm of each worker is unlike its earlier ones."""
        known = (seen[:, COUNT] >= self.warmup) & (seen[:, VARIANCE] > 0)
        return known & (norms - seen[:, AVERAGE] > self.threshold * seen[:, VARIANCE].sqrt())

    def _updated(self, seen: Tensor, norms: Tensor) -> Tensor:
        """The moving average and variance of each worker's norms with one more."""
        difference = norms - seen[:, AVERAGE]
        average = seen[:, AVERAGE] + self.alpha * difference
        variance = (1 - self.alpha) * (seen[:, VARIANCE] + self.alpha * difference * (norms - average))
        return torch.stack([average, variance, seen[:, COUNT] + 1], dim=1)

    def _clipped(self, x: Tensors, averaged: Tensors) -> Tensors:
        moved = {name: value - averaged[name] for name, value in x.items()}
        norm = torch.stack([each.double().norm() for each in moved.values()]).norm()
        if norm <= self.clip:
            return averaged
        return {name: value - (moved[name] * (self.clip / norm)).to(value.dtype) for name, value in x.items()}


def _rows(seen: Tensor | None, workers: int) -> Tensor:
    """A copy of what is remembered of a parameter, with a row for each worker; (workers, 3) float64 on the CPU."""
    rows = torch.zeros(workers, 3, dtype=torch.float64)
    if seen is None:
        return rows
    return torch.cat([seen.cpu(), rows[len(seen) :]])


def _those_with_weight(parts: Sequence[Tensor], weights: Sequence[float]) -> tuple[list[Tensor], list[float]]:
    pairs = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight]
    return [part for part, _ in pairs], [weight for _, weight in pairs]
