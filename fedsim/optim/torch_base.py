"""torch's optimizers without their import of torch's compiler, which fedsim does not use.

Decorators of some methods of torch's `Optimizer` import the compiler at the first call. That takes a second in every
new process, and on a node each message is a new process. These classes remove the decorators; the arithmetic is the
same.
"""

from __future__ import annotations

import inspect

import torch
from torch.optim import Optimizer as TorchOptimizer


class Optimizer(TorchOptimizer):
    """`torch.optim.Optimizer`; subclasses define `step`."""

    add_param_group = inspect.unwrap(TorchOptimizer.add_param_group)
    zero_grad = inspect.unwrap(TorchOptimizer.zero_grad)


def without_compiler(kind: type[TorchOptimizer]) -> type[TorchOptimizer]:
    """A subclass of a `torch.optim` optimizer without that import."""
    step = torch.no_grad()(inspect.unwrap(kind.step))
    return type(kind.__name__, (Optimizer, kind), {"step": step, "__doc__": f"`torch.optim.{kind.__name__}`."})
