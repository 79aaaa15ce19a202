"""LAMB against torch-optimizer's, timm's, torch's AdamW, and arithmetic by hand."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_optimizer
from timm.optim.lamb import Lamb
from torch import nn
from torch.optim import Optimizer

from fedsim.optim.lamb import LAMB
from tests.optim import small_net
from tests.optim.small_net import GROUPINGS, Net, close, difference, groups, vector

train = functools.partial(small_net.train, rate=small_net.warmup_cosine(0.01))
trained = functools.partial(small_net.trained, rate=small_net.warmup_cosine(0.01))


@pytest.mark.parametrize("decay_on", GROUPINGS)
@pytest.mark.parametrize(
    ("own", "others"),
    [
        ({}, {}),
        ({"betas": (0.0, 0.99), "eps": 1e-4}, {"betas": (0.0, 0.99), "eps": 1e-4}),
        ({"clamp_value": 0.5}, {"clamp_value": 0.5}),
        ({"clamp_value": None}, {"clamp_value": 1e9}),
        ({"clamp_value": math.inf}, {"clamp_value": 1e9}),
        ({"bias_correction": "step-size"}, {"debias": True}),
    ],
    ids=["default", "no-momentum", "clamped", "unclamped", "inf", "step-size"],
)
def test_equals_torch_optimizer(decay_on: str, own: dict[str, Any], others: dict[str, Any]) -> None:
    ours = trained(lambda net: LAMB(groups(net, decay_on), **own))
    theirs = trained(lambda net: torch_optimizer.Lamb(groups(net, decay_on), **others))
    assert difference(ours, Net().double()) > 1e-2
    assert difference(ours, theirs) <= 1e-12


@pytest.mark.parametrize("decay_on", GROUPINGS)
@pytest.mark.parametrize("adapt_undecayed", [False, True])
@pytest.mark.parametrize("corrected", [False, True])
def test_equals_timm(decay_on: str, adapt_undecayed: bool, corrected: bool) -> None:
    correction = "moments" if corrected else "none"
    ours = trained(
        lambda net: LAMB(
            groups(net, decay_on), bias_correction=correction, clamp_value=None, adapt_undecayed=adapt_undecayed
        ),
    )
    theirs = trained(
        lambda net: Lamb(
            groups(net, decay_on), bias_correction=corrected, always_adapt=adapt_undecayed, max_grad_norm=None
        ),
    )
    assert difference(ours, theirs) <= 1e-12


def test_without_a_trust_ratio_and_with_corrected_moments_it_is_adam() -> None:
    options: dict[str, Any] = {"adapt_undecayed": False, "bias_correction": "moments"}
    ours = trained(lambda net: LAMB(net.parameters(), eps=1e-8, **options))
    adam = trained(lambda net: torch.optim.Adam(net.parameters(), eps=1e-8))
    assert difference(ours, adam) <= 1e-12


def test_the_three_bias_corrections_differ() -> None:
    def make(correction: str) -> Callable[[nn.Module], Optimizer]:
        return lambda net: LAMB(net.parameters(), bias_correction=correction)

    nets = [trained(make(correction)) for correction in ("none", "step-size", "moments")]
    for i in range(3):
        assert difference(nets[i], nets[i - 1]) > 1e-3


# b1 = 3/4 and b2 = 15/16: after the first step m = g/4 and sqrt(v) = |g|/4, corrected g and |g|
BY_HAND: dict[str, Any] = {"lr": 0.5, "betas": (0.75, 0.9375), "weight_decay": 0.1, "eps": 0, "clamp_value": None}


@pytest.mark.parametrize("correction", ["none", "moments"])
def test_one_step_by_hand(correction: str) -> None:
    # the Adam step is (1, -1), u = (1, -1) + 0.1 (3, 4) = (1.3, -0.6), ||w|| = 5
    w = vector(3, 4, grad=(2, -7))
    optimizer = LAMB([w], **{**BY_HAND, "bias_correction": correction})
    optimizer.step()
    r = 5 / math.hypot(1.3, -0.6)
    close(w, 3 - 0.5 * r * 1.3, 4 + 0.5 * r * 0.6)
    close(optimizer.state[w]["exp_avg"], 0.5, -1.75)
    close(optimizer.state[w]["exp_avg_sq"], 4 / 16, 49 / 16)
    assert optimizer.state[w]["step"].item() == 1


def test_one_step_with_clamp_and_corrected_step_size_by_hand() -> None:
    # sqrt(1 - b2) / (1 - b1) = (1/4) / (1/4) = 1 at b2 = 15/16; at b2 = 3/4 it is 2, and the Adam step is (1, -1) / 2
    w = vector(3, 4, grad=(2, -7))
    LAMB([w], **{**BY_HAND, "betas": (0.75, 0.75), "clamp_value": 2, "bias_correction": "step-size"}).step()
    r = 2 / math.hypot(0.8, -0.1)
    close(w, 3 - 0.5 * 2 * r * 0.8, 4 + 0.5 * 2 * r * 0.1)


def test_eps_joins_the_root_of_the_corrected_moment() -> None:
    w = vector(1, grad=(2,))
    LAMB([w], lr=1, eps=0.5, adapt_undecayed=False, bias_correction="moments").step()
    close(w, 1 - 2 / (2 + 0.5))


def test_ratio_is_one_where_a_norm_is_zero_or_undecayed_are_left_alone() -> None:
    zero, idle, undecayed = vector(0, 0, grad=(2, -7)), vector(3, 4, grad=(0, 0)), vector(3, 4, grad=(2, -7))
    options = {**BY_HAND, "weight_decay": 0, "eps": 1e-30}
    LAMB([zero, idle], **options).step()
    LAMB([undecayed], **options, adapt_undecayed=False).step()
    close(zero, -0.5, 0.5)
    close(idle, 3, 4)
    close(undecayed, 2.5, 4.5)


def test_step_count_follows_its_parameter() -> None:
    source, target = nn.Parameter(torch.ones(2)), nn.Parameter(torch.empty(2, dtype=torch.bfloat16, device="meta"))
    source.grad = torch.ones(2)
    optimizer, other = LAMB([source]), LAMB([target])
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    state = other.state[target]
    assert (state["step"].device.type, state["step"].dtype) == ("meta", torch.float32)
    assert (state["exp_avg"].device.type, state["exp_avg"].dtype) == ("meta", torch.bfloat16)


def test_a_parameter_that_joins_later_counts_its_own_steps() -> None:
    early, late = vector(1, grad=(1,)), vector(1, grad=(1,))
    late.grad = None
    optimizer = LAMB([early, late], lr=0.5, eps=0, adapt_undecayed=False, bias_correction="moments")
    optimizer.step()
    assert late not in optimizer.state
    late.grad = torch.ones_like(late)
    optimizer.step()
    close(early, 1 - 0.5 - 0.5)  # a constant gradient: each corrected step is 1
    close(late, 1 - 0.5)
