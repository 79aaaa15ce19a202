"""What LARS and LAMB share: the parameters of a group as lists, and norms that stay on their device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]
Closure = Callable[[], float]


def require_nonnegative(**arguments: float | Tensor) -> None:
    """Refuse an argument below zero, and a NaN."""
    for name, value in arguments.items():
        if not value >= 0:
            raise ValueError(f"invalid {name}: it must be at least 0, not {value}")


def evaluate(closure: Closure | None) -> float | None:
    """The loss that `closure` recomputes together with its gradients; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def parameter_lists(group: Group) -> Iterable[list[Tensor]]:
    """The parameters of `group` that have a gradient: one list for each device and dtype, as foreach ops want them."""
    lists: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in group["params"]:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            raise RuntimeError("LARS and LAMB take no sparse gradients: the norm of a whole layer enters every step")
        lists.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return lists.values()


def gradients(parameters: list[Tensor]) -> list[Tensor]:
    """The gradients of `parameters`, of those that have one."""
    return [p.grad for p in parameters if p.grad is not None]


def zeros_for(parameter: Tensor) -> Tensor:
    """Zeros laid out like `parameter`, for an optimizer to remember."""
    if parameter.is_cuda and torch.cuda.is_current_stream_capturing():
        # the zeros would become part of the graph, and every replay would forget the steps before it
        raise RuntimeError("take a step before capturing one in a CUDA graph: the first step creates the state")
    return torch.zeros_like(parameter, memory_format=torch.preserve_format)


def norms(tensors: list[Tensor]) -> Tensor:
    """(N,) L2 norms of N tensors, on their device."""
    return torch.stack(torch._foreach_norm(tensors))
