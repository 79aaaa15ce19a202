"""Muon for matrices and convolutions, and another optimizer for all else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedsim.optim._foreach import Group
from fedsim.optim.torch_optimizers import TORCH_OPTIMIZERS, Optimizer, form_of, without_compiler

TORCHS_MUON: Callable[..., Optimizer] = without_compiler(torch.optim.Muon)


class Muon(Optimizer):
    """`torch.optim.Muon` (Jordan et al. 2024) of parameters of two dimensions or more, `other` of all other ones.

    Muon takes a step along the orthogonalized momentum of a matrix. That of a convolution has a row for each output
    channel. `groups` have their weight decay; `other` is a name of `TORCH_OPTIMIZERS`, whose rate is `other_lr` times
    that of Muon. `muon` holds other arguments of `torch.optim.Muon`.
    """

    def __init__(self, groups: list[Group], lr: float, other: str, other_lr: float, muon: Group) -> None:
        super().__init__(groups, {"lr": lr})
        self._matrices = {p: p.detach().flatten(1).clone() for g in groups for p in g["params"] if p.ndim > 1}
        self._other_lr = other_lr
        self._parts = [(group, self._of_matrices(group, muon), self._of_others(group, other)) for group in groups]

    def _of_matrices(self, group: Group, muon: Group) -> Optimizer | None:
        """Muon over copies of the matrices of a group; the state of each is also that of its parameter."""
        parameters = [p for p in group["params"] if p in self._matrices]
        if not parameters:
            return None
        optimizer = TORCHS_MUON([self._matrices[p] for p in parameters], weight_decay=group["weight_decay"], **muon)
        for parameter in parameters:
            self.state[parameter] = optimizer.state[self._matrices[parameter]]
        return optimizer

    def _of_others(self, group: Group, name: str) -> Optimizer | None:
        parameters = [p for p in group["params"] if p not in self._matrices]
        if not parameters:
            return None
        kind = TORCH_OPTIMIZERS[name]
        form = form_of(kind, parameters[0].device.type)
        optimizer = kind(parameters, weight_decay=group["weight_decay"], **form)
        for parameter in parameters:
            self.state[parameter] = optimizer.state[parameter]
        return optimizer

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for parameter, matrix in self._matrices.items():
            matrix.copy_(parameter.flatten(1))
            matrix.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        for group, of_matrices, of_others in self._parts:
            for optimizer, lr in ((of_matrices, group["lr"]), (of_others, group["lr"] * self._other_lr)):
                if optimizer:
                    optimizer.param_groups[0]["lr"] = lr
                    optimizer.step()
        for parameter, matrix in self._matrices.items():
            parameter.copy_(matrix.view_as(parameter))
