from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.errors import UserError
from fedsim.models import build_model
from fedsim.models.dropout import Dropout, StepKeys, set_dropout_keys
from fedsim.models.lenet import LeNetBN
from tests.conftest import assert_same_bits, register


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("lenet-bn", 100, 1_774_052),
        ("lenet5", 10, 62_006),
        ("lenet5", 100, 69_656),
        ("resnet20", 10, 272_474),
        ("resnet20", 100, 278_324),
        ("resnet18", 100, 11_220_132),
        ("resnet18-v2", 100, 11_227_812),
        ("vit-tiny", 100, 5_380_132),
    ],
)
def test_parameters(name: str, classes: int, parameters: int) -> None:
    model = build_model(name, classes, seed=0)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, classes)


def papers_lenet_bn(model: LeNetBN, x: Tensor) -> Tensor:
    """The paper's layers in the paper's order, without dropout."""
    h = F.max_pool2d(F.relu(model.bn1(F.conv2d(x, model.conv1.weight, model.conv1.bias, padding=2))), 2)
    h = F.max_pool2d(F.relu(model.bn2(F.conv2d(h, model.conv2.weight, model.conv2.bias, padding=2))), 2)
    h = F.relu(F.linear(h.flatten(1), model.fc1.weight, model.fc1.bias))
    h = F.relu(F.linear(h, model.fc2.weight, model.fc2.bias))
    return F.linear(h, model.fc3.weight, model.fc3.bias)


def test_lenet_bn_is_the_papers_layers_in_their_order_bitwise() -> None:
    """Loss and gradients are the same bits, although ReLU comes after the pooling here."""
    model = build_model("lenet-bn", 100, 0)
    assert isinstance(model, LeNetBN)
    model.dropout1.eval()
    model.dropout2.eval()
    x = torch.randn(16, 3, 32, 32).to(memory_format=torch.channels_last)
    gradients = []
    for logits in (model(x), papers_lenet_bn(model, x)):
        loss = F.cross_entropy(logits, torch.arange(16))
        gradients.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_initial_weights_are_the_seeds_and_pytorchs_default() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    one, same, other = (build_model("lenet5", 10, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["fc1.weight"], other["fc1.weight"])
    bound = (16 * 5 * 5) ** -0.5  # nn.Linear's default: uniform in 1 / sqrt(inputs)
    assert 0.99 * bound < one["fc1.weight"].abs().max() <= bound


def test_threads_build_the_same_model_at_once() -> None:
    """They would draw each other's weights, or wait for each other for ever."""
    before = torch.get_rng_state()
    expected = build_model("lenet5", 10, 1).state_dict()
    built: list[dict[str, Tensor]] = []
    threads = [
        threading.Thread(target=lambda: built.append(build_model("lenet5", 10, 1).state_dict()), daemon=True)
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(built) == len(threads)
    for state in built:
        assert_same_bits(state, expected)
    assert torch.equal(torch.get_rng_state(), before)


class Unusual(nn.Module):
    """A dropout layer under two names, called three times, and something that a test puts in."""

    def __init__(self, classes: int, part: nn.Module) -> None:
        super().__init__()
        self.dropout = self.again = nn.Dropout(0.25)
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.dropout(x), self.dropout(x), self.again(x)])


def masks(model: nn.Module, x: Tensor, *keys: int) -> Tensor:
    step_keys = StepKeys(len(keys))
    set_dropout_keys(model, step_keys)
    step_keys.begin_step(torch.tensor(keys))
    y: Tensor = model(x)
    return y


def test_every_dropout_of_a_model_follows_its_key_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, "unusual", lambda classes: Unusual(classes, nn.Linear(1, 1)))
    model, x = build_model("unusual", 10, 0), torch.ones(1000, 100)
    one, two, three = masks(model, x, 1)
    assert torch.equal(masks(model, x, 1), torch.stack([one, two, three]))
    for other in (two, three, masks(model, x, 2)[0]):
        assert not torch.equal(one, other)
    assert not torch.equal(two, three)
    assert sorted(set(one.flatten().tolist())) == pytest.approx([0.0, 4 / 3])
    assert float(one.mean()) == pytest.approx(1, abs=0.01)
    assert torch.equal(model.eval()(x)[0], x)


def test_dropout_of_replicas_is_that_of_each_alone() -> None:
    layer, x = Dropout(0.5), torch.ones(3, 4, 5)
    together = masks(layer, x, 7, 8, 9)
    for replica, key in enumerate((7, 8, 9)):
        assert torch.equal(masks(layer, x[replica], key), together[replica])


def test_dropout_of_whole_channels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, "unusual", lambda classes: Unusual(classes, nn.Dropout2d(0.5)))
    with pytest.raises(UserError, match=r"part \(Dropout2d\) draws from torch's global generator: use nn.D"):
        build_model("unusual", 10, 0)


def test_a_buffer_that_no_state_dict_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(classes: int) -> nn.Module:
        part = nn.Linear(1, 1)
        part.register_buffer("table", torch.ones(3), persistent=False)
        return Unusual(classes, part)

    register(monkeypatch, "unusual", build)
    with pytest.raises(UserError, match=r"every buffer must be persistent, part\.table is not"):
        build_model("unusual", 10, 0)
