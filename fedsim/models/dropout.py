"""Dropout with masks that depend only on seed, worker and local step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.errors import UserError
from fedsim.rng import random_words_on_device

_RESOLUTION = 2**24  # a mask compares 24 random bits with the probability
_MASK = 2**40  # numbers reserved for each mask, so that masks never share any


class StepKeys:
    """The dropout keys of the current step, one for each of K replicas, and the number of masks drawn in it."""

    def __init__(self, replicas: int = 1, device: torch.device | str = "cpu") -> None:
        self.values = torch.zeros(replicas, dtype=torch.int64, device=device)  # filled in place: a CUDA graph reads it
        self.masks = 0

    def begin_step(self, values: Tensor) -> None:
        """Set the keys of the next step: `values`, (K,) int64 or a scalar; see `fedsim.rng.step_keys`."""
        self.values.copy_(values)
        self.masks = 0


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) with counter-based masks, the same on every device.

    With keys of K replicas, the first dimension of the input is that of the replicas. A layer that is called twice in a
    step draws two masks. Without keys it is `nn.Dropout`, which draws from torch's global generator.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.keys: StepKeys | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`x` of any shape; the result has the same."""
        if not self.training or self.keys is None:
            return F.dropout(x, self.p, self.training)
        keys = self.keys.values
        words = random_words_on_device(keys, x.numel() // len(keys), self.keys.masks * _MASK)
        self.keys.masks += 1
        mask = (words & (_RESOLUTION - 1)) < (1 - self.p) * _RESOLUTION
        return x * mask.view(x.shape).to(x.dtype).div_(1 - self.p)


def use_counter_based_dropout(model: nn.Module) -> None:
    """Replace every `nn.Dropout` in `model` by `Dropout`; raises UserError for its variants, as `nn.Dropout2d`."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is nn.Dropout:
            model.set_submodule(name, Dropout(module.p))
        elif isinstance(module, nn.modules.dropout._DropoutNd):
            kind = type(module).__name__
            raise UserError(f"{name} ({kind}) draws from torch's global generator: use nn.Dropout")


def set_dropout_keys(model: nn.Module, keys: StepKeys) -> None:
    """Make every `Dropout` of `model` draw its masks from `keys`."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.keys = keys
