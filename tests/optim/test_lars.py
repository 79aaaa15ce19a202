"""LARS against torch-optimizer's, timm's, torch's SGD, and arithmetic by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_optimizer
from timm.optim.lars import Lars
from torch import nn
from torch.optim import Optimizer

from fedsim.optim.lars import LARS
from tests.optim import small_net
from tests.optim.small_net import GROUPINGS, Net, close, difference, groups, vector

train = functools.partial(small_net.train, rate=small_net.warmup_cosine(0.1))
trained = functools.partial(small_net.trained, rate=small_net.warmup_cosine(0.1))


@pytest.mark.parametrize("decay_on", GROUPINGS)
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}],
    ids=["plain", "momentum", "nesterov"],
)
def test_equals_torch_optimizer(decay_on: str, options: dict[str, Any]) -> None:
    options = {**options, "lr": 0.1, "trust_coefficient": 0.01}
    ours = trained(lambda net: LARS(groups(net, decay_on), **options))
    theirs = trained(lambda net: torch_optimizer.LARS(groups(net, decay_on), **options))
    assert difference(ours, Net().double()) > 1e-2
    assert difference(ours, theirs) <= 1e-12


@pytest.mark.parametrize("decay_on", GROUPINGS)
@pytest.mark.parametrize("adapt_undecayed", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_equals_timm(decay_on: str, adapt_undecayed: bool, nesterov: bool) -> None:
    def net_without_zero_gradients() -> nn.Module:
        # where a gradient is zero timm decays the weights, unscaled
        net = Net().double()
        net.idle.requires_grad_(False)
        return net

    ours, theirs = net_without_zero_gradients(), net_without_zero_gradients()
    shared: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov}
    own = LARS(groups(ours, decay_on), trust_coefficient=0.01, adapt_undecayed=adapt_undecayed, **shared)
    other = Lars(groups(theirs, decay_on), trust_coeff=0.01, always_adapt=adapt_undecayed, **shared)
    train(ours, own, range(30))
    train(theirs, other, range(30))
    assert difference(ours, theirs) <= 1e-12


def test_without_decay_is_sgd() -> None:
    ours = trained(lambda net: LARS(net.parameters(), lr=0.1, momentum=0.9))
    sgd = trained(lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    assert difference(ours, sgd) <= 1e-12


def test_two_steps_by_hand() -> None:
    # ||w|| = 5, ||g|| = 2, d = 0.1: r = 0.5 * 5 / (2 + 0.1 * 5) = 1; g + d w = (0.3, 2.4)
    w = vector(3, 4, grad=(0, 2))
    optimizer = LARS([w], lr=0.5, momentum=0.5, weight_decay=0.1, trust_coefficient=0.5, eps=0)
    optimizer.step()
    close(w, 3 - 0.5 * 0.3, 4 - 0.5 * 2.4)
    # w is now (2.85, 2.8); without a gradient neither a ratio nor decay: v halves
    w.grad = torch.zeros_like(w)
    optimizer.step()
    close(w, 2.85 - 0.5 * 0.15, 2.8 - 0.5 * 1.2)
    close(optimizer.state[w]["momentum_buffer"], 0.15, 1.2)


def test_ratio_is_one_at_zero_weights_and_without_decay() -> None:
    zero, undecayed = vector(0, 0, grad=(1, 2)), vector(3, 4, grad=(1, 2))
    LARS([zero], lr=0.5, weight_decay=0.1).step()
    LARS([undecayed], lr=0.5).step()
    close(zero, -0.5, -1)
    close(undecayed, 2.5, 3)


def test_adapt_undecayed_by_hand() -> None:
    w = vector(3, 4, grad=(0, 2))
    LARS([w], lr=1, trust_coefficient=0.2, eps=0, adapt_undecayed=True).step()
    close(w, 3, 4 - 2 * 0.2 * 5 / 2)


def test_lr_in_momentum_by_hand() -> None:
    # the rate falls from 1 to 0.1 after the first step: v still holds the first step's rate
    w = vector(1, grad=(1,))
    optimizer = LARS([w], lr=1, momentum=0.5, lr_in_momentum=True)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    close(w, 1 - 1 - (0.5 * 1 + 0.1 * 1))


@pytest.mark.parametrize("decay_on", GROUPINGS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_lr_in_momentum_differs_only_when_the_rate_varies(decay_on: str, nesterov: bool) -> None:
    def make(inside: bool) -> Callable[[nn.Module], Optimizer]:
        return lambda net: LARS(
            groups(net, decay_on),
            lr=0.1,
            momentum=0.9,
            nesterov=nesterov,
            lr_in_momentum=inside,
            trust_coefficient=0.01,
        )

    # a power of two, so that rounding does not depend on where the rate enters
    outside, inside = (trained(make(inside), rate=lambda _: 0.125) for inside in (False, True))
    assert difference(outside, inside) <= 1e-15
    outside, inside = (trained(make(inside)) for inside in (False, True))
    assert difference(outside, inside) > 1e-3


def test_a_parameter_that_joins_later_starts_afresh() -> None:
    early, late = vector(1, grad=(1,)), vector(1, grad=(1,))
    late.grad = None
    optimizer = LARS([early, late], lr=1, momentum=0.5)
    optimizer.step()
    assert late not in optimizer.state
    late.grad = torch.ones_like(late)
    optimizer.step()
    close(early, 1 - 1 - (0.5 + 1))
    close(late, 1 - 1)
