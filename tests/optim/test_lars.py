"""LARS against torch-optimizer's, timm's, torch's SGD, and arithmetic by hand."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_optimizer
from timm.optim.lars import Lars
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from fedsim.optim.lars import LARS
from tests.conftest import NEEDS_GPU
from tests.optim import small_net
from tests.optim.small_net import GROUPINGS, Net, calls_of_second_step, close, difference, groups, vector

train = functools.partial(small_net.train, rate=small_net.warmup_cosine(0.1))
trained = functools.partial(small_net.trained, rate=small_net.warmup_cosine(0.1))
ALL_SWITCHES: dict[str, Any] = {
    "momentum": 0.9,
    "dampening": 0.1,
    "trust_coefficient": 0.02,
    "eps": 1e-6,
    "lr_in_momentum": True,
    "adapt_undecayed": True,
}


@pytest.mark.parametrize("decay_on", GROUPINGS)
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.3}],
    ids=["plain", "momentum", "nesterov", "dampening"],
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
    train(ours, own, range(50))
    train(theirs, other, range(50))
    assert difference(ours, theirs) <= 1e-12


def test_without_decay_is_sgd() -> None:
    ours = trained(lambda net: LARS(net.parameters(), lr=0.1, momentum=0.9, dampening=0.2))
    sgd = trained(lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, dampening=0.2))
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
    outside, inside = (trained(make(inside), 50, rate=lambda _: 0.125) for inside in (False, True))
    assert difference(outside, inside) <= 1e-15
    outside, inside = (trained(make(inside), 50) for inside in (False, True))
    assert difference(outside, inside) > 1e-3


@pytest.mark.parametrize("copier", ["pickle", "deepcopy", "state_dict"])
@pytest.mark.parametrize("switches", [{}, ALL_SWITCHES], ids=["default", "switches"])
def test_a_copy_continues_bitwise(copier: str, switches: dict[str, Any]) -> None:
    net = Net().double()
    optimizer: Optimizer = LARS(groups(net, "matrices"), lr=0.1, **{"momentum": 0.9, **switches})
    train(net, optimizer, range(5))
    if copier == "state_dict":
        other_net = copy.deepcopy(net)
        other: Optimizer = LARS(groups(other_net, "matrices"))  # every setting must come from the state
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif copier == "pickle":
        other_net, other = pickle.loads(pickle.dumps((net, optimizer)))
    else:
        other_net, other = copy.deepcopy((net, optimizer))
    train(net, optimizer, range(5, 15))
    train(other_net, other, range(5, 15))
    assert difference(net, other_net) == 0
    for own, others in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert {**own, "params": 0} == {**others, "params": 0}


@pytest.mark.parametrize("decay_on", GROUPINGS)
@pytest.mark.parametrize("inside", [False, True])
def test_a_tensor_rate_is_a_rate(decay_on: str, inside: bool) -> None:
    def make(lr: float | Tensor) -> Callable[[nn.Module], Optimizer]:
        return lambda net: LARS(groups(net, decay_on), lr=lr, momentum=0.9, lr_in_momentum=inside)

    tensor_rate = trained(make(torch.tensor(0.1, dtype=torch.float64)), steps=50)
    assert difference(trained(make(0.1), steps=50), tensor_rate) <= 1e-14


@pytest.mark.parametrize("weight_decay", [0, 0.1])
@pytest.mark.parametrize("switches", [{"momentum": 0.9, "nesterov": True}, ALL_SWITCHES], ids=["default", "switches"])
def test_step_is_multi_tensor_and_reads_nothing_back(weight_decay: float, switches: dict[str, Any]) -> None:
    few, many = (
        calls_of_second_step(LARS, n, lr=torch.tensor(0.1), weight_decay=weight_decay, **switches).names
        for n in (2, 20)
    )
    assert few == many
    assert not {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"} & set(many)


@pytest.mark.parametrize("rate_on", ["cuda", "cpu"])
@pytest.mark.parametrize("switches", [{"momentum": 0.9, "nesterov": True}, ALL_SWITCHES], ids=["default", "switches"])
def test_step_on_a_make_believe_gpu(rate_on: str, switches: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode():  # raises where a value would be read or two devices would meet
        params = [nn.Parameter(torch.ones(3, device=device)) for device in ("cuda", "cpu", "cuda")]
        for p in params:
            p.grad = torch.ones_like(p)
        groups = [{"params": params if rate_on == "cpu" else params[::2], "weight_decay": 0.1}]
        lr = torch.full((), 0.1, device=rate_on)
        optimizer = LARS(groups, **switches)
        optimizer.param_groups[0]["lr"] = lr  # the constructor may read it, to validate it
        optimizer.step()
        optimizer.step()
    for parameter, entries in optimizer.state.items():
        assert {value.device for value in entries.values()} == {parameter.device}


def test_state_is_not_created_inside_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode():
        w = nn.Parameter(torch.ones(3, device="cuda"))
        w.grad = torch.ones_like(w)
        with pytest.raises(RuntimeError, match="before capturing"):
            LARS([w], momentum=0.9).step()


@pytest.mark.gpu
@NEEDS_GPU
def test_replayed_graph_equals_steps() -> None:
    def make() -> tuple[nn.Parameter, LARS]:
        w = nn.Parameter(torch.tensor([3.0, 4.0], device="cuda"))
        w.grad = torch.tensor([0.0, 2.0], device="cuda")
        return w, LARS([w], lr=torch.tensor(0.5, device="cuda"), momentum=0.9, weight_decay=0.1)

    w, optimizer = make()
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records, and runs nothing
        optimizer.step()
    expected, reference = make()
    reference.step()
    for lr in (0.5, 0.25, 0.125):
        optimizer.param_groups[0]["lr"].fill_(lr)
        graph.replay()
        reference.param_groups[0]["lr"].fill_(lr)
        reference.step()
    torch.testing.assert_close(w, expected)


def test_mixed_dtypes_and_layouts() -> None:
    torch.manual_seed(0)
    values = [torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.randn(5).double(), torch.randn(4)]
    values.append(torch.randn(6).bfloat16())
    together = [nn.Parameter(value.clone()) for value in values]
    alone = [nn.Parameter(value.clone()) for value in values]
    optimizers = [LARS(together, lr=1, **ALL_SWITCHES), *(LARS([p], lr=1, **ALL_SWITCHES) for p in alone)]
    for _ in range(3):
        for p in together + alone:
            p.grad = p.detach().sin()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        buffer = optimizers[0].state[p]["momentum_buffer"]
        assert (buffer.dtype, buffer.stride()) == (p.dtype, p.stride())
        assert torch.equal(p, q)


def test_a_parameter_that_joins_later_starts_afresh() -> None:
    early, late = vector(1, grad=(1,)), vector(1, grad=(1,))
    late.grad = None
    optimizer = LARS([early, late], lr=1, momentum=0.5, dampening=0.5)
    optimizer.step()
    assert late not in optimizer.state
    late.grad = torch.ones_like(late)
    optimizer.step()
    close(early, 1 - 1 - (0.5 + 0.5))
    close(late, 1 - 1)


def test_closure_runs_with_gradients_and_its_loss_is_returned() -> None:
    w = vector(3, grad=(0,))
    optimizer = LARS([w], lr=0.5)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    assert optimizer.step(closure) == 9
    close(w, 3 - 0.5 * 6)


def test_sparse_gradients_are_refused() -> None:
    w = nn.Parameter(torch.zeros(3))
    w.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        LARS([w]).step()


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1},
        {"lr": math.nan},
        {"lr": torch.tensor(-1.0)},
        {"momentum": -0.1},
        {"dampening": -0.1},
        {"weight_decay": -0.1},
        {"trust_coefficient": -0.1},
        {"eps": -0.1},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    ],
)
def test_invalid_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LARS([nn.Parameter(torch.zeros(1))], **options)


def test_a_rate_of_zero_changes_nothing() -> None:
    w = vector(3, 4, grad=(1, 2))
    LARS([w], lr=0, weight_decay=0.1).step()
    close(w, 3, 4)
