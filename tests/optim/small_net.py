"""A small network to compare optimizers on, and helpers of the tests of LARS and LAMB."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

STEPS = 40
GROUPINGS = ("all", "matrices", "none")
Rate = Callable[[int], float]  # step -> learning rate


class Net(nn.Module):
    """A network with a parameter that is initially zero, one with a zero gradient, and one without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, bias=False)  # a bias before BN has a gradient of rounding errors only
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(64, 3)
        self.idle = nn.Parameter(torch.ones(3))
        self.unused = nn.Parameter(torch.ones(3))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.bn(self.conv(x)).relu().flatten(1))
        return logits + 0 * self.idle


def groups(net: nn.Module, decay_on: str, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    params = list(net.parameters())
    if decay_on == "all":
        return [{"params": params, "weight_decay": weight_decay}]
    if decay_on == "none":
        return [{"params": params, "weight_decay": 0.0}]
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]


def warmup_cosine(peak: float) -> Rate:
    """Warm-up over 10 steps, then cosine to 0 at step `STEPS`."""

    def rate(step: int) -> float:
        factor = (step + 1) / 10 if step < 10 else (1 + math.cos(math.pi * (step - 10) / (STEPS - 10))) / 2
        return peak * factor

    return rate


def train(net: nn.Module, optimizer: Optimizer, steps: range, rate: Rate) -> None:
    """Take `steps` on batches that depend only on the step."""
    for step in steps:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate(step))
            else:
                group["lr"] = rate(step)
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 2, 6, 6, dtype=torch.float64, generator=generator)
        y = torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def trained(make: Callable[[nn.Module], Optimizer], steps: int = STEPS, *, rate: Rate) -> nn.Module:
    net = Net().double()
    train(net, make(net), range(steps), rate)
    return net


def difference(a: nn.Module, b: nn.Module) -> float:
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


def vector(*values: float, grad: tuple[float, ...]) -> nn.Parameter:
    parameter = nn.Parameter(torch.tensor(values, dtype=torch.float64))
    parameter.grad = torch.tensor(grad, dtype=torch.float64)
    return parameter


def close(actual: Tensor, *expected: float) -> None:
    torch.testing.assert_close(actual.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14)


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the name of every operator that runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def calls_of_second_step(optimizer_class: Callable[..., Optimizer], parameters: int, **options: Any) -> Calls:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(3, 2, generator=generator)) for _ in range(parameters)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = optimizer_class(params, **options)
    optimizer.step()
    with Calls() as calls:
        optimizer.step()
    return calls  # type: ignore[no-any-return]
