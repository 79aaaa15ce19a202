"""How the buffers of several workers become one set: BatchNorm's running statistics by module type, others by mean."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from strategies.mean import mean


def batchnorm_buffers(model: nn.Module) -> dict[str, str]:
    """The buffers of the BatchNorm layers of `model`: name in its state_dict -> entry, for instance running_var."""
    return {
        name: name.rpartition(".")[2]
        for prefix, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for name, _ in module.named_buffers(prefix, recurse=False)
    }


def merge(
    buffers: Sequence[Mapping[str, Tensor]], weights: Sequence[float], how: str, batchnorm: Collection[str]
) -> dict[str, Tensor]:
    """One set of buffers out of each worker's, in the order of the workers; `weights` sum to one.

    Those named in `batchnorm` are averaged (`how` = average) or those of the first worker (first-worker); all others
    are averaged. Counters stay integers: the largest is taken.
    """
    merged = mean(buffers, weights)
    if how == "first-worker":
        merged |= {name: value for name, value in buffers[0].items() if name in batchnorm}
    return merged
