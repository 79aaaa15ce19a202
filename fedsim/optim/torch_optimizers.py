"""The optimizers of `torch.optim` by name, as the optimizer of local steps.

Left out are those that cannot train every model here (LBFGS needs a closure, SparseAdam sparse gradients; Muon needs
matrices, see `fedsim.optim.muon`), Rprop, which reads its learning rate only once and so ignores the schedule, and
ASGD, whose result is an average beside the parameters that it trains.

Decorators of some methods of torch's `Optimizer` import torch's compiler, which fedsim does not use, at the first call.
That takes a second in every new process, and on a node each message is a new process. The classes here have the methods
without their decorators; the arithmetic is the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

CLASSES = ("Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD")
NEW_STATE = {"mu_product": 1.0}  # of NAdam; every other entry of a state starts at zero


class Optimizer(torch.optim.Optimizer):
    """`torch.optim.Optimizer`; subclasses define `step`."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


def without_compiler(kind: type[torch.optim.Optimizer]) -> type[Optimizer]:
    """A subclass of a `torch.optim` optimizer without the import of the compiler."""
    step = torch.no_grad()(inspect.unwrap(kind.step))
    return type(kind.__name__, (Optimizer, kind), {"step": step, "__doc__": f"`torch.optim.{kind.__name__}`."})


TORCH_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    name.lower(): without_compiler(getattr(torch.optim, name)) for name in CLASSES
}


def form_of(kind: Callable[..., Any], device: str) -> dict[str, bool]:
    """The switches for the fastest form of an optimizer of PyTorch's that supports a tensor as the learning rate."""
    if kind not in TORCH_OPTIMIZERS.values():
        return {}
    forms = inspect.signature(kind).parameters
    if device == "cpu":
        return {"fused": True} if "fused" in forms else {}
    if can_be_captured(kind):
        return {switch: True for switch in ("fused", "capturable") if switch in forms}
    return {"foreach": False}


def can_be_captured(kind: Callable[..., Any]) -> bool:
    """Whether a step of an optimizer of PyTorch's can be part of a CUDA graph."""
    return kind is TORCH_OPTIMIZERS["sgd"] or "capturable" in inspect.signature(kind).parameters
