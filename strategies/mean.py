"""Exact, repeatable weighted means of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from strategies.arguments import check_fields
from strategies.method import ServerRound, State, Tensors

MEAN = "mean"  # the owner of what a mean remembers, in the server's state
CPU_BLOCK = 2**15  # values averaged at a time: their float64 sums stay in a core's cache, which is twice as fast


@dataclass(frozen=True)
class Mean:
    """What is made of the tensors that the workers of a round send."""

    exact, weighted, of_each_value = False, True, False  # of_each_value: each by itself, not of whole updates

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def by_shards(self) -> bool:
        """Whether an update counts in proportion to the number of images that its worker holds."""
        return False

    @property
    def fewest(self) -> int:
        """The fewest workers of which it leaves one out that is unlike the others; 1 where it leaves none out."""
        return 1

    def problem(self, workers: int) -> str:
        """Why it has no meaning of so many workers, with the remedy; empty if it has."""
        return f"it needs 3 clients in a round, not {workers}: give exact" if self.fewest > 1 and workers < 3 else ""

    def __call__(self, x: Tensors, parts: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
        """The mean of each named tensor over `parts`, in their order; `x` is what all of them began from.

        `weights` sum to one.
        """
        raise NotImplementedError

    def of_models(self, r: ServerRound, x: Tensors, state: State) -> tuple[Tensors, State]:
        """The mean of the parameters in the updates of a round, and what the server remembers; by default nothing."""
        return self(x, [update.parameters for update in r.updates.values()], r.weights), {}


@dataclass(frozen=True)
class Weighted(Mean):
    """A mean in which an update counts as any other (with local epochs, by its images), or in proportion to a shard."""

    weights: Literal["equal", "shard-size"] = "equal"

    @property
    def by_shards(self) -> bool:
        return self.weights == "shard-size"


@dataclass(frozen=True)
class Exact(Weighted):
    """The weighted mean, and of integers (counters) the largest."""

    exact = True

    def __call__(self, x: Tensors, parts: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
        return mean(parts, weights)


def mean(parts: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of each named tensor over `parts`, in their order; `weights` sum to one.

    Integer tensors are counters: the largest value is taken, since a rounded mean would lose steps.
    """
    floats = [name for name, value in parts[0].items() if value.is_floating_point()]
    lists = [[part[name] for name in floats] for part in parts]
    means = dict(zip(floats, weighted_means(lists, weights), strict=True))
    return {
        name: means[name] if name in means else torch.stack([part[name] for part in parts]).amax(0) for name in parts[0]
    }


def weighted_means(parts: Sequence[list[Tensor]], weights: Sequence[float]) -> list[Tensor]:
    """`weighted_mean` of each column of `parts`, the lists of the workers' tensors.

    On a GPU each operation takes all tensors of a worker at once, in few kernels; the results are the same bits.
    """
    if not parts[0] or parts[0][0].device.type == "cpu":
        return [weighted_mean(column, weights) for column in zip(*parts, strict=True)]
    origins, offsets, values = ([torch.empty_like(t, dtype=torch.float64) for t in parts[0]] for _ in range(3))
    torch._foreach_copy_(origins, parts[0])
    torch._foreach_zero_(offsets)
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        torch._foreach_copy_(values, part)
        torch._foreach_sub_(values, origins)
        torch._foreach_mul_(values, weight)
        torch._foreach_add_(offsets, values)
    torch._foreach_add_(offsets, origins)
    means = [torch.empty_like(tensor) for tensor in parts[0]]
    torch._foreach_copy_(means, offsets)
    return means


def weighted_mean(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of equally shaped tensors, summed in float64 in their order, in their own precision.

    `weights` sum to one. The mean is computed as x_0 + sum w_i (x_i - x_0), which is exactly x_0 where all x_i are
    equal, even if the weights are rounded. Each operation is rounded separately (no fused multiply-add), so that
    neither the memory layout nor the device changes a bit.
    """
    result = torch.empty_like(parts[0])
    for block, first, *others in zip(_blocks(result), *(_blocks(part) for part in parts), strict=True):
        origin = first.double()
        offset = torch.zeros_like(origin)
        for other, weight in zip(others, weights[1:], strict=True):
            offset.add_(other.to(torch.float64, copy=True).sub_(origin).mul_(weight))
        block.copy_(offset.add_(origin))
    return result


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of a tensor's rows, of about `CPU_BLOCK` values each."""
    rows = tensor if tensor.ndim else tensor.view(1)
    if tensor.numel() <= CPU_BLOCK:
        return (rows,)
    return torch.split(rows, max(1, CPU_BLOCK * len(rows) // tensor.numel()))
