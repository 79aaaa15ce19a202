"""The optimizers of `torch.optim` by name, as the optimizer of local steps.

Left out are those that cannot train every model here (LBFGS needs a closure, SparseAdam sparse gradients, Muon only
matrices), Rprop, which reads its learning rate only once and so ignores the schedule, and ASGD, whose result is an
average beside the parameters that it trains.

Decorators of some methods of torch's `Optimizer` import torch's compiler, which fedsim does not use, at the first call.
That takes a second in every new process, and on a node each message is a new process. The classes here have the methods
without their decorators; the arithmetic is the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

Groups = list[dict[str, Any]]
CLASSES = ("Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD")
OWN_KEYS = ("lr", "weight_decay")  # arguments that have keys of their own
OF_THE_IMPLEMENTATION = ("params", "foreach", "fused", "capturable", "differentiable")  # not of the method
NEW_STATE = {"mu_product": 1.0}  # of NAdam; every other entry of a state starts at zero
NOT_ZERO = ("initial_accumulator_value", "dampening")  # of Adagrad and SGD: with them a new state is not all zero


class Optimizer(torch.optim.Optimizer):
    """`torch.optim.Optimizer`; subclasses define `step`."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


def _without_compiler(kind: type[torch.optim.Optimizer]) -> type[Optimizer]:
    """A subclass of a `torch.optim` optimizer without the import of the compiler."""
    step = torch.no_grad()(inspect.unwrap(kind.step))
    return type(kind.__name__, (Optimizer, kind), {"step": step, "__doc__": f"`torch.optim.{kind.__name__}`."})


TORCH_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    name.lower(): _without_compiler(getattr(torch.optim, name)) for name in CLASSES
}


def torch_optimizer(name: str, groups: Groups, lr: float, arguments: dict[str, Any]) -> Optimizer:
    """The optimizer `name` over `groups`, in its fastest form that supports a tensor as the learning rate."""
    kind = TORCH_OPTIMIZERS[name]
    forms = inspect.signature(kind).parameters
    if groups[0]["params"][0].device.type == "cpu":
        form = {"fused": True} if "fused" in forms else {}
    elif can_be_captured(name):
        form = {switch: True for switch in ("fused", "capturable") if switch in forms}
    else:
        form = {"foreach": False}
    return kind(groups, lr=lr, **form, **arguments)


def can_be_captured(name: str) -> bool:
    """Whether a step of the optimizer `name` can be part of a CUDA graph."""
    return name == "sgd" or "capturable" in inspect.signature(TORCH_OPTIMIZERS[name]).parameters


def check_arguments(name: str, arguments: dict[str, Any]) -> None:
    """Raise ValueError where the optimizer `name` does not take the arguments, or does not step with them."""
    refused = (*OWN_KEYS, *OF_THE_IMPLEMENTATION, *NOT_ZERO)
    known = [argument for argument in inspect.signature(TORCH_OPTIMIZERS[name]).parameters if argument not in refused]
    for argument in arguments:
        if argument in OWN_KEYS:
            raise ValueError(f"{argument} has a key of its own: give --{argument.replace('_', '-')}")
        if argument not in known:
            raise ValueError(f"{name} has no argument {argument}: it must be one of {', '.join(known)}")
    parameter = torch.zeros(1)
    parameter.grad = torch.zeros(1)
    try:
        torch_optimizer(name, [{"params": [parameter]}], 0.1, arguments).step()
    except Exception as error:  # an argument that the optimizer refuses, or fails on
        raise ValueError(f"{name}: {str(error).splitlines()[0]}") from error
    if not parameter.isfinite():
        raise ValueError(f"{name} divides zero by zero where a gradient is zero: give an eps above 0")
