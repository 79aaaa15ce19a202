"""Dropout whose masks depend on the worker and the local step alone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.rng import random_words_on_device

_RESOLUTION = 2**24  # a mask compares 24 random bits with the probability
_LAYER = 2**40  # numbers apart: the words of one layer never reach those of the next


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) with counter-based masks, the same on every device.

    `keys` is a (K,) int64 tensor, the current step's key of each of K replicas that lie along the first dimension of
    the input; see `fedsim.rng.step_keys`. Without keys it is `nn.Dropout`, which draws from the process's global state.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.layer = 0
        self.keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`x` of any shape; the result has the same."""
        if not self.training or self.keys is None:
            return F.dropout(x, self.p, self.training)
        words = random_words_on_device(self.keys, x.numel() // len(self.keys), self.layer * _LAYER)
        kept = (words & (_RESOLUTION - 1)) < (1 - self.p) * _RESOLUTION
        return x * kept.view(x.shape).to(x.dtype).div_(1 - self.p)


def set_dropout_keys(model: nn.Module, keys: Tensor) -> None:
    """Let every dropout layer of `model` read the keys of the current step from `keys`, which is filled in place."""
    layers = [module for module in model.modules() if isinstance(module, Dropout)]
    for number, module in enumerate(layers):
        module.layer, module.keys = number, keys
