"""torch's optimizers without what they load for torch.compile, which fedsim does not use.

Some methods of torch's `Optimizer` import torch's compiler when they are first called: a second in every new process,
and a node has one for each message. These classes have the same methods without that wrapping, and the same arithmetic.
"""

from __future__ import annotations

import inspect

import torch
from torch.optim import SGD
from torch.optim import Optimizer as TorchOptimizer


class Optimizer(TorchOptimizer):
    """The base of optimizers whose `step` is their own."""

    add_param_group = inspect.unwrap(TorchOptimizer.add_param_group)
    zero_grad = inspect.unwrap(TorchOptimizer.zero_grad)


class SGDM(Optimizer, SGD):
    """`torch.optim.SGD`."""

    step = torch.no_grad()(inspect.unwrap(SGD.step))
