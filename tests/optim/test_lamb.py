"""LAMB against torch-optimizer's, timm's, torch's AdamW, and arithmetic by hand."""

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
from timm.optim.lamb import Lamb
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from fedsim.optim.lamb import LAMB
from tests.conftest import NEEDS_GPU
from tests.optim import small_net
from tests.optim.small_net import GROUPINGS, Net, calls_of_second_step, close, difference, groups, vector

train = functools.partial(small_net.train, rate=small_net.warmup_cosine(0.01))
trained = functools.partial(small_net.trained, rate=small_net.warmup_cosine(0.01))
PAPER: dict[str, Any] = {"bias_correction": "moments", "clamp_value": None}
ALL_SWITCHES: dict[str, Any] = {
    "betas": (0.8, 0.99),
    "eps": 1e-5,
    "bias_correction": "moments",
    "clamp_value": 0.5,
    "adapt_undecayed": False,
}


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
        ({"adam": True}, {"adam": True}),
    ],
    ids=["default", "no-momentum", "clamped", "unclamped", "inf", "step-size", "adam"],
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
        steps=50,
    )
    theirs = trained(
        lambda net: Lamb(
            groups(net, decay_on), bias_correction=corrected, always_adapt=adapt_undecayed, max_grad_norm=None
        ),
        steps=50,
    )
    assert difference(ours, theirs) <= 1e-12


def test_adam_with_corrected_moments_is_adamw() -> None:
    ours = trained(lambda net: LAMB(net.parameters(), eps=1e-8, weight_decay=0.1, adam=True, bias_correction="moments"))
    adamw = trained(lambda net: torch.optim.AdamW(net.parameters(), eps=1e-8, weight_decay=0.1))
    assert difference(ours, adamw) <= 1e-12


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
    LAMB([w], lr=1, eps=0.5, adam=True, bias_correction="moments").step()
    close(w, 1 - 2 / (2 + 0.5))


def test_ratio_is_one_where_a_norm_is_zero_or_undecayed_are_left_alone() -> None:
    zero, idle, undecayed = vector(0, 0, grad=(2, -7)), vector(3, 4, grad=(0, 0)), vector(3, 4, grad=(2, -7))
    options = {**BY_HAND, "weight_decay": 0, "eps": 1e-30}
    LAMB([zero, idle], **options).step()
    LAMB([undecayed], **options, adapt_undecayed=False).step()
    close(zero, -0.5, 0.5)
    close(idle, 3, 4)
    close(undecayed, 2.5, 4.5)


@pytest.mark.parametrize("copier", ["pickle", "deepcopy", "state_dict", "file"])
@pytest.mark.parametrize("switches", [{}, ALL_SWITCHES, {"adam": True}], ids=["default", "switches", "adam"])
def test_a_copy_continues_bitwise(copier: str, switches: dict[str, Any], tmp_path: Any) -> None:
    net = Net().double()
    optimizer: Optimizer = LAMB(groups(net, "matrices"), **switches)
    train(net, optimizer, range(5))
    if copier == "pickle":
        other_net, other = pickle.loads(pickle.dumps((net, optimizer)))
    elif copier == "deepcopy":
        other_net, other = copy.deepcopy((net, optimizer))
    else:
        other_net = copy.deepcopy(net)
        other = LAMB(groups(other_net, "matrices"))  # every setting must come from the state
        state = copy.deepcopy(optimizer.state_dict())
        if copier == "file":
            torch.save(state, tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt", weights_only=True)
        other.load_state_dict(state)
    train(net, optimizer, range(5, 15))
    train(other_net, other, range(5, 15))
    assert difference(net, other_net) == 0
    for own, others in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert {**own, "params": 0} == {**others, "params": 0}
    for entries in other.state.values():
        assert (entries["step"].item(), entries["step"].dtype) == (15, torch.float32)


def test_step_count_follows_its_parameter() -> None:
    source, target = nn.Parameter(torch.ones(2)), nn.Parameter(torch.empty(2, dtype=torch.bfloat16, device="meta"))
    source.grad = torch.ones(2)
    optimizer, other = LAMB([source]), LAMB([target])
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    state = other.state[target]
    assert (state["step"].device.type, state["step"].dtype) == ("meta", torch.float32)
    assert (state["exp_avg"].device.type, state["exp_avg"].dtype) == ("meta", torch.bfloat16)


@pytest.mark.parametrize("decay_on", GROUPINGS)
@pytest.mark.parametrize("correction", ["none", "step-size", "moments"])
def test_a_tensor_rate_is_a_rate(decay_on: str, correction: str) -> None:
    def make(lr: float | Tensor) -> Callable[[nn.Module], Optimizer]:
        return lambda net: LAMB(groups(net, decay_on), lr=lr, bias_correction=correction)

    assert difference(trained(make(0.1), 50), trained(make(torch.tensor(0.1, dtype=torch.float64)), 50)) <= 1e-14


@pytest.mark.parametrize("weight_decay", [0, 0.1])
@pytest.mark.parametrize("switches", [{}, {"bias_correction": "step-size"}, ALL_SWITCHES])
def test_step_is_multi_tensor_and_reads_nothing_back(weight_decay: float, switches: dict[str, Any]) -> None:
    few, many = (
        calls_of_second_step(LAMB, n, lr=torch.tensor(0.1), weight_decay=weight_decay, **switches).names
        for n in (2, 20)
    )
    assert few == many
    assert not {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"} & set(many)


@pytest.mark.parametrize("rate_on", ["cuda", "cpu"])
@pytest.mark.parametrize(
    "switches", [{}, {"bias_correction": "step-size"}, ALL_SWITCHES], ids=["default", "step-size", "switches"]
)
def test_step_on_a_make_believe_gpu(rate_on: str, switches: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode():  # raises where a value would be read or two devices would meet
        params = [nn.Parameter(torch.ones(3, device=device)) for device in ("cuda", "cpu", "cuda")]
        for p in params:
            p.grad = torch.ones_like(p)
        groups = [{"params": params if rate_on == "cpu" else params[::2], "weight_decay": 0.1}]
        lr = torch.full((), 0.1, device=rate_on)
        optimizer = LAMB(groups, **switches)
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
            LAMB([w]).step()


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("correction", ["none", "step-size", "moments"])
def test_replayed_graph_equals_steps(correction: str) -> None:
    def make() -> tuple[nn.Parameter, LAMB]:
        w = nn.Parameter(torch.tensor([3.0, 4.0], device="cuda"))
        w.grad = torch.tensor([1.0, 2.0], device="cuda")
        lr = torch.tensor(0.5, device="cuda")
        return w, LAMB([w], lr=lr, weight_decay=0.1, bias_correction=correction)

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


@pytest.mark.parametrize(
    "switches", [{}, {"bias_correction": "step-size"}, PAPER], ids=["default", "step-size", "paper"]
)
def test_mixed_dtypes_and_layouts(switches: dict[str, Any]) -> None:
    torch.manual_seed(0)
    values = [torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.randn(5).double(), torch.randn(4)]
    values.append(torch.randn(6).bfloat16())
    together = [nn.Parameter(value.clone()) for value in values]
    alone = [nn.Parameter(value.clone()) for value in values]
    optimizers = [LAMB(together, lr=0.1, **switches), *(LAMB([p], lr=0.1, **switches) for p in alone)]
    for _ in range(3):
        for p in together + alone:
            p.grad = p.detach().sin()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        for entry in ("exp_avg", "exp_avg_sq"):
            value = optimizers[0].state[p][entry]
            assert (value.dtype, value.stride()) == (p.dtype, p.stride())
        assert torch.equal(p, q)


def test_a_parameter_that_joins_later_counts_its_own_steps() -> None:
    early, late = vector(1, grad=(1,)), vector(1, grad=(1,))
    late.grad = None
    optimizer = LAMB([early, late], lr=0.5, eps=0, adam=True, bias_correction="moments")
    optimizer.step()
    assert late not in optimizer.state
    late.grad = torch.ones_like(late)
    optimizer.step()
    close(early, 1 - 0.5 - 0.5)  # a constant gradient: each corrected step is 1
    close(late, 1 - 0.5)


def test_closure_runs_with_gradients_and_its_loss_is_returned() -> None:
    w = vector(3, grad=(0,))
    optimizer = LAMB([w], lr=0.5, eps=0, adam=True, bias_correction="moments")

    def closure() -> float:
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    assert optimizer.step(closure) == 9
    close(w, 2.5)


def test_sparse_gradients_are_refused() -> None:
    w = nn.Parameter(torch.zeros(3))
    w.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        LAMB([w]).step()


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1},
        {"lr": math.nan},
        {"lr": torch.tensor(-1.0)},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"eps": -0.1},
        {"weight_decay": -0.1},
        {"bias_correction": "moment"},
        {"clamp_value": -1},
    ],
)
def test_invalid_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LAMB([nn.Parameter(torch.zeros(1))], **options)


def test_a_rate_of_zero_changes_nothing() -> None:
    w = vector(3, 4, grad=(1, 2))
    LAMB([w], lr=0, weight_decay=0.1).step()
    close(w, 3, 4)
