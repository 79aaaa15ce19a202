"""Stacked copies of a network compute the same as each copy alone, or the unsupported operation is named."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.models import stack as module
from fedsim.models.dropout import Dropout
from fedsim.models.stack import CannotStack, check_stack, stack
from fedsim.models.stacked_layers import OPERATIONS_ELEMENTWISE

IMAGE = (3, 12, 12)


class Zoo(nn.Module):
    """Every kind of layer, and the ways in which a forward pass reshapes, pools and joins."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=(1, 4), dilation=(1, 2), bias=False)
        self.norm = nn.BatchNorm2d(8, momentum=None)
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=4, padding_mode="reflect")
        self.group_norm = nn.GroupNorm(2, 8)
        self.act = nn.ReLU(inplace=True)
        self.layer_norm = nn.LayerNorm(16)
        self.head = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8, affine=False), nn.Tanh(), Dropout(0.5))
        self.attend = nn.Linear(8, 8, bias=False)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.wide(x)))
        y = F.relu(self.group_norm(self.grouped(x))) + x
        y = y * torch.sigmoid(F.adaptive_avg_pool2d(y, 1))
        y = torch.cat([F.max_pool2d(y, 2), F.avg_pool2d(x, 2)], dim=1)
        tokens = self.layer_norm(y.flatten(2).mean(-1).view(y.size(0), -1))
        pooled = y.mean((2, 3)).reshape(-1, y.shape[1])
        y = self.head(tokens + pooled)
        return self.last(y - self.attend(y).softmax(dim=1))  # type: ignore[no-any-return]


def waiting(begun: threading.Event, over: threading.Event) -> nn.Module:
    """A model whose forward pass sets one event and lasts until the other."""

    class Waiting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            begun.set()
            assert over.wait(60)
            return self.last(x.flatten(1))  # type: ignore[no-any-return]

    return Waiting()


def test_a_model_is_traced_while_other_threads_use_models_and_trace_theirs() -> None:
    """As when several runs train in one process."""
    begun, over, other_begun, other_over = (threading.Event() for _ in range(4))
    call, layer, ones = nn.Module.__call__, nn.Linear(2, 2), torch.ones(1, 2)
    expected = layer(ones)
    with ThreadPoolExecutor() as pool:
        one = pool.submit(stack, waiting(begun, over), 2)
        assert begun.wait(60)
        other = pool.submit(stack, waiting(other_begun, other_over), 2)
        other_begun.wait(0.3)  # in vain: it takes its turn
        try:
            assert torch.equal(layer(ones), expected)
        finally:
            over.set()
            wait([one], timeout=0.3)
            other_over.set()
        for network in (one.result(), other.result()):
            assert network(torch.ones(1, 4, 1, 1)).shape == (2, 1, 3)
    assert nn.Module.__call__ is call


@pytest.mark.parametrize("by_products", [False, True])
def test_stacked_copies_are_the_copies(by_products: bool) -> None:
    """In float64; the networks that runs train are tested, with their optimizers, in tests/training."""
    check_stack(lambda: Zoo().double(), IMAGE, by_products)


def test_the_copies_start_from_the_models_values_under_its_names() -> None:
    model = Zoo()
    stacked = stack(model, 3)
    for name, value in model.state_dict().items():
        assert torch.equal(stacked.state_dict()[name], torch.cat([value] * 3) if value.ndim else value)
    assert stacked(torch.zeros(2, 9, 12, 12)).shape == (3, 2, 4)


class Custom(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.PReLU()), r"1 \(PReLU\)"),
        (nn.Sequential(OwnLinear(3, 3)), "0.weight"),
        (Custom(lambda m, x: m.fc(x).cumsum(1)), "method cumsum"),
        (Custom(lambda m, x: m.fc(F.dropout(x))), "function dropout"),
        (Custom(lambda m, x: m.fc(x).mean()), "method mean"),
        (Custom(lambda m, x: m.fc(x)[:, 0]), "function getitem"),
        (Custom(lambda m, x: m.fc(x) * m.scale, scale=nn.Parameter(torch.ones(3))), "get_attr scale"),
        (Custom(lambda m, x: (m.fc(x), x)), "output"),
        (Custom(lambda m, x: m.fc(x) if x.sum() > 0 else x), "cannot trace the forward pass of Custom"),
        (Custom(lambda m, x: m.fc(x), unused=nn.Linear(1, 1)), r"unused\.bias, unused\.weight: no layer"),
    ],
)
def test_what_cannot_be_stacked_is_named(model: nn.Module, message: str) -> None:
    with pytest.raises(CannotStack, match=message):
        stack(model, 2)


def test_a_wrong_network_does_not_pass_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a sum along the features were an operation on each value: it would run along the batch."""
    monkeypatch.setattr(module, "OPERATIONS_ELEMENTWISE", OPERATIONS_ELEMENTWISE | {"cumsum"})
    with pytest.raises(CannotStack, match="the output of the stacked network is wrong by"):
        check_stack(lambda: Custom(lambda m, x: m.fc(x).cumsum(1)).double(), (3,))


class Alternating(nn.Module):
    """Its forward pass changes with a count that is no buffer."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.fc, self.every, self.calls = nn.Linear(3, 3), every, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x) * 2 if self.calls % self.every else self.fc(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("every", [2, 3])
def test_a_forward_pass_that_changes_with_its_calls_is_not_stacked(every: int) -> None:
    with pytest.raises(CannotStack, match="the forward pass of Alternating: it changes from call to call"):
        stack(Alternating(every), 2)


class Remembering(nn.Module):
    """Its forward pass changes what it holds, and computes the same each time."""

    def __init__(self, remember: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.seen, self.remember = nn.Linear(3, 3), [0], remember

    def forward(self, x: Tensor) -> Tensor:
        self.remember(self, x)
        return self.fc(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("remember", "name"),
    [
        (lambda m, x: m.seen.append(1), "seen"),
        (lambda m, x: setattr(m, "last", x), "last"),
        (lambda m, x: setattr(m.fc, "calls", 1), "fc.calls"),
    ],
)
def test_a_forward_pass_with_a_state_that_is_no_buffer_is_not_stacked(
    remember: Callable[[Any, Tensor], Any], name: str
) -> None:
    with pytest.raises(CannotStack, match=f"cannot stack the forward pass: it changes {name}, which is no buffer"):
        stack(Remembering(remember), 2)
    stack(Remembering(lambda m, x: m.seen), 2)


def test_a_network_that_cannot_run_does_not_pass_the_check() -> None:
    with pytest.raises(CannotStack, match="the stacked network fails with"):
        check_stack(lambda: Custom(lambda m, x: m.fc(x).view((-1, 3))).double(), (3,))
