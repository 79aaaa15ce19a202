"""torch's optimizers without their import of torch's compiler, which fedsim does not use.

Some methods of torch's `Optimizer` are wrapped to import the compiler at their first call. That takes a second in every
new process, and on a node each message is a new process. These classes unwrap them; the arithmetic is the same.
"""

from __future__ import annotations

import inspect

import torch
from torch.optim import SGD
from torch.optim import Optimizer as TorchOptimizer


class Optimizer(TorchOptimizer):
    """`torch.optim.Optimizer`; subclasses define `step`."""

    add_param_group = inspect.unwrap(TorchOptimizer.add_param_group)
    zero_grad = inspect.unwrap(TorchOptimizer.zero_grad)


def without_compiler(kind: type[TorchOptimizer]) -> type[TorchOptimizer]:
    """A subclass of a `torch.optim` optimizer that is the same without that import."""
    step = torch.no_grad()(inspect.unwrap(kind.step))
    return type(kind.__name__, (Optimizer, kind), {"step": step, "__doc__": f"`torch.optim.{kind.__name__}`."})


class SGDM(Optimizer, SGD):
    """`torch.optim.SGD`."""

    step = torch.no_grad()(inspect.unwrap(SGD.step))
