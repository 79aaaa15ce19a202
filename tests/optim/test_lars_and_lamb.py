"""What LARS and LAMB have in common: copies, rates in tensors, graphs, dtypes, closures, and what they refuse."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from fedsim.optim.lamb import LAMB
from fedsim.optim.lars import LARS
from tests.conftest import NEEDS_GPU
from tests.optim import small_net
from tests.optim.small_net import GROUPINGS, Net, calls_of_second_step, close, difference, groups, vector

Make = Callable[..., Optimizer]
train = functools.partial(small_net.train, rate=small_net.warmup_cosine(0.05))
trained = functools.partial(small_net.trained, rate=small_net.warmup_cosine(0.05))
SWITCHES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "lars-nesterov": (LARS, {"momentum": 0.9, "nesterov": True}),
    "lars-switches": (
        LARS,
        {
            **{"momentum": 0.9, "trust_coefficient": 0.02, "eps": 1e-6},
            **{"lr_in_momentum": True, "adapt_undecayed": True},
        },
    ),
    "lamb": (LAMB, {}),
    "lamb-step-size": (LAMB, {"bias_correction": "step-size"}),
    "lamb-switches": (
        LAMB,
        {
            **{"betas": (0.8, 0.99), "eps": 1e-5, "bias_correction": "moments"},
            **{"clamp_value": 0.5, "adapt_undecayed": False},
        },
    ),
}


@pytest.fixture(params=SWITCHES)
def make(request: pytest.FixtureRequest) -> Make:
    """The constructor of an optimizer with its switches set."""
    optimizer, options = SWITCHES[request.param]
    return functools.partial(optimizer, **options)


@pytest.mark.parametrize("copier", ["pickle", "deepcopy", "file"])
def test_a_copy_continues_bitwise(copier: str, make: Make, tmp_path: Path) -> None:
    net = Net().double()
    optimizer = make(groups(net, "matrices"))
    train(net, optimizer, range(5))
    if copier == "pickle":
        other_net, other = pickle.loads(pickle.dumps((net, optimizer)))
    elif copier == "deepcopy":
        other_net, other = copy.deepcopy((net, optimizer))
    else:
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        other_net = copy.deepcopy(net)
        other = type(optimizer)(groups(other_net, "matrices"))  # type: ignore[call-arg]  # settings come from the state
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(net, optimizer, range(5, 15))
    train(other_net, other, range(5, 15))
    assert difference(net, other_net) == 0
    for own, others in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert {**own, "params": 0} == {**others, "params": 0}
    for entries in other.state.values():
        assert "step" not in entries or (entries["step"].item(), entries["step"].dtype) == (15, torch.float32)


@pytest.mark.parametrize("decay_on", GROUPINGS)
def test_a_tensor_rate_is_a_rate(decay_on: str, make: Make) -> None:
    rates = (0.1, torch.tensor(0.1, dtype=torch.float64))
    number, tensor = (trained(lambda net, lr=lr: make(groups(net, decay_on), lr=lr), 20) for lr in rates)  # type: ignore[misc]
    assert difference(number, tensor) <= 1e-14


@pytest.mark.parametrize("weight_decay", [0, 0.1])
def test_step_is_multi_tensor_and_reads_nothing_back(weight_decay: float, make: Make) -> None:
    few, many = (calls_of_second_step(make, n, lr=torch.tensor(0.1), weight_decay=weight_decay).names for n in (2, 20))
    assert few == many
    assert not {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"} & set(many)


@pytest.mark.parametrize("rate_on", ["cuda", "cpu"])
def test_step_on_a_make_believe_gpu(rate_on: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode():  # raises where a value would be read or two devices would meet
        params = [nn.Parameter(torch.ones(3, device=device)) for device in ("cuda", "cpu", "cuda")]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = make([{"params": params if rate_on == "cpu" else params[::2], "weight_decay": 0.1}])
        optimizer.param_groups[0]["lr"] = torch.full((), 0.1, device=rate_on)  # the constructor may read it
        optimizer.step()
        optimizer.step()
    for parameter, entries in optimizer.state.items():
        assert {value.device for value in entries.values()} == {parameter.device}


def test_state_is_not_created_inside_a_graph(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode():
        w = nn.Parameter(torch.ones(3, device="cuda"))
        w.grad = torch.ones_like(w)
        with pytest.raises(RuntimeError, match="before capturing"):
            make([w]).step()


@pytest.mark.gpu
@NEEDS_GPU
def test_replayed_graph_equals_steps(make: Make) -> None:
    def begun() -> tuple[nn.Parameter, Optimizer]:
        w = nn.Parameter(torch.tensor([3.0, 4.0], device="cuda"))
        w.grad = torch.tensor([1.0, 2.0], device="cuda")
        return w, make([w], lr=torch.tensor(0.5, device="cuda"), weight_decay=0.1)

    w, optimizer = begun()
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records, and runs nothing
        optimizer.step()
    expected, reference = begun()
    reference.step()
    for lr in (0.5, 0.25, 0.125):
        optimizer.param_groups[0]["lr"].fill_(lr)
        graph.replay()
        reference.param_groups[0]["lr"].fill_(lr)
        reference.step()
    torch.testing.assert_close(w, expected)


def test_mixed_dtypes_and_layouts(make: Make) -> None:
    torch.manual_seed(0)
    values = [torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.randn(5).double(), torch.randn(4)]
    values.append(torch.randn(6).bfloat16())
    together = [nn.Parameter(value.clone()) for value in values]
    alone = [nn.Parameter(value.clone()) for value in values]
    optimizers = [make(together, lr=0.1), *(make([p], lr=0.1) for p in alone)]
    for _ in range(3):
        for p in together + alone:
            p.grad = p.detach().sin()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        entries = [value for name, value in optimizers[0].state[p].items() if name != "step"]
        assert {(value.dtype, value.stride()) for value in entries} == {(p.dtype, p.stride())}
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("optimizer", "options", "after"),
    [(LARS, {}, 3 - 0.5 * 6), (LAMB, {"eps": 0, "adapt_undecayed": False, "bias_correction": "moments"}, 2.5)],
)
def test_closure_runs_with_gradients_and_its_loss_is_returned(optimizer: Any, options: Any, after: float) -> None:
    w = vector(3, grad=(0,))
    made = optimizer([w], lr=0.5, **options)

    def closure() -> float:
        made.zero_grad()
        loss = (w**2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    assert made.step(closure) == 9
    close(w, after)


@pytest.mark.parametrize("optimizer", [LARS, LAMB])
def test_sparse_gradients_are_refused_and_a_rate_of_zero_changes_nothing(optimizer: Any) -> None:
    w = nn.Parameter(torch.zeros(3))
    w.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer([w]).step()
    w = vector(3, 4, grad=(1, 2))
    optimizer([w], lr=0, weight_decay=0.1).step()
    close(w, 3, 4)


BOTH: list[dict[str, Any]] = [{"lr": -1}, {"lr": math.nan}, {"lr": torch.tensor(-1.0)}]
BOTH += [{"weight_decay": -0.1}, {"eps": -0.1}]
LARS_ALONE: list[dict[str, Any]] = [{"momentum": -0.1}, {"trust_coefficient": -0.1}]
LARS_ALONE += [{"nesterov": True}]
LAMB_ALONE: list[dict[str, Any]] = [{"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}]
LAMB_ALONE += [{"bias_correction": "moment"}, {"clamp_value": -1}]


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [*((LARS, options) for options in BOTH + LARS_ALONE), *((LAMB, options) for options in BOTH + LAMB_ALONE)],
)
def test_invalid_arguments(optimizer: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        optimizer([nn.Parameter(torch.zeros(1))], **options)
