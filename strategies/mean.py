"""Exact, repeatable weighted means of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

CPU_BLOCK = 2**15  # values averaged at a time: their float64 sums stay in a core's cache, which doubles the speed


def mean(parts: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of each named tensor over `parts`, in their order; `weights` sum to one.

    Integer tensors are counters: the largest value is taken, since a rounded mean would lose steps.
    """
    return {name: _mean_of([part[name] for part in parts], weights) for name in parts[0]}


def _mean_of(parts: list[Tensor], weights: Sequence[float]) -> Tensor:
    if not parts[0].is_floating_point():
        return torch.stack(parts).amax(0)
    return weighted_mean(parts, weights)


def weighted_mean(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of equally shaped tensors, summed in float64 in their order, in their own precision.

    `weights` sum to one. The first tensor is taken as the origin: sum w_i (x_i - x_0) + x_0 gives exactly x_0
    where all x_i are equal, whatever the rounding of the weights. Every operation rounds by itself (no fused
    multiply-add), so that neither the layout of the tensors nor the device changes a bit.
    """
    result = torch.empty_like(parts[0])
    for block, first, *others in zip(_blocks(result), *(_blocks(part) for part in parts), strict=True):
        origin = first.double()
        offset = torch.zeros_like(origin)
        for other, weight in zip(others, weights[1:], strict=True):
            offset.add_(other.double().sub(origin).mul_(weight))  # of float64, double() is no copy
        block.copy_(offset.add_(origin))
    return result


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of a tensor's rows, as many at a time as are best summed together: on a GPU, all."""
    rows = tensor if tensor.ndim else tensor.view(1)
    if tensor.device.type != "cpu" or tensor.numel() <= CPU_BLOCK:
        return (rows,)
    return torch.split(rows, max(1, CPU_BLOCK * len(rows) // tensor.numel()))
