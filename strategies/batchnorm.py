"""BatchNorm's running statistics, found by module type, and what becomes of them at a sync."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batchnorm_buffers(model: nn.Module) -> dict[str, str]:
    """The buffers of the BatchNorm layers of `model`: name in its state_dict -> entry, for instance running_var."""
    return {
        name: name.rpartition(".")[2]
        for prefix, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for name, _ in module.named_buffers(prefix, recurse=False)
    }


def merge(
    average: Mapping[str, Tensor], of_first: Mapping[str, Tensor], how: str, batchnorm: Collection[str]
) -> dict[str, Tensor]:
    """The buffers after a round: the workers' `average` or, for those named in `batchnorm`, the first worker's.

    `how` is average or first-worker.
    """
    if how == "first-worker":
        return {**average, **{name: value for name, value in of_first.items() if name in batchnorm}}
    return dict(average)
