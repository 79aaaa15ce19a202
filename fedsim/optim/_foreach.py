"""Shared parts of LARS and LAMB: a step of multi-tensor operations, without synchronization with the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fedsim.optim.torch_optimizers import Optimizer

Group = dict[str, Any]


class LayerwiseOptimizer(Optimizer):
    """The base of LARS and LAMB: a step updates all parameters of a group that share device and dtype together."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; returns the loss of `closure`, which also computes gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameters, gradients in _with_gradients(group):
                self._update(parameters, gradients, group)
        return loss

    def _update(self, params: list[Tensor], grads: list[Tensor], group: Group) -> None:
        """One step of `params` with the gradients `grads`, all on one device and of one dtype."""
        raise NotImplementedError


def require_nonnegative(**arguments: float | Tensor) -> None:
    """Raise ValueError if an argument is negative or NaN."""
    for name, value in arguments.items():
        if not value >= 0:
            raise ValueError(f"invalid {name}: it must be at least 0, not {value}")


def _with_gradients(group: Group) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
    """The parameters of `group` that have a gradient, and their gradients, by device and dtype for foreach ops."""
    lists: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for parameter in group["params"]:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            raise RuntimeError("LARS and LAMB do not support sparse gradients")
        parameters, gradients = lists.setdefault((parameter.device, parameter.dtype), ([], []))
        parameters.append(parameter)
        gradients.append(parameter.grad)
    return lists.values()


def zeros_for(parameter: Tensor) -> Tensor:
    """A new state buffer: zeros in the memory layout of `parameter`."""
    if parameter.is_cuda and torch.cuda.is_current_stream_capturing():
        # the graph would record the zeros, and each replay would reset the buffer
        raise RuntimeError("take a step before capturing one in a CUDA graph: the first step creates the state")
    return torch.zeros_like(parameter, memory_format=torch.preserve_format)


def norms(tensors: list[Tensor]) -> Tensor:
    """(N,) L2 norms of N tensors, on their device."""
    return torch.stack(torch._foreach_norm(tensors))
