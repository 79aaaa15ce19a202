"""The workers of a round at once are the workers one by one: in float64 to 1e-12, by every way, for every optimizer."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from fedsim.config import Config
from fedsim.data.image_sets import facts_of
from fedsim.device import resolve
from fedsim.errors import UserError
from fedsim.models import build_model
from fedsim.models.lenet import LeNet5
from fedsim.training import local_round
from fedsim.training.local_round import RoundEnd, RoundStart
from fedsim.training.stacked import StackedWorkers
from tests.conftest import SMALL_BATCHNORM, register

WAYS = {"groups": False, "products": True}  # whether by products
OPTIMIZERS: list[dict[str, Any]] = [
    {"optimizer": "sgdm:nesterov=true", "decay-biases-and-norms": False},
    {"optimizer": "lars:trust=0.05", "decay-biases-and-norms": False},
    {"optimizer": "lamb", "decay-biases-and-norms": False},
]
OTHER_OPTIMIZERS: list[dict[str, Any]] = [
    {"optimizer": "sgdm", "momentum": 0.0},
    {"optimizer": "lars:backend=torch-optimizer", "decay-biases-and-norms": False},
    {"optimizer": "lamb:backend=torch-optimizer", "decay-biases-and-norms": False},
    {"optimizer": "adamw", "decay-biases-and-norms": False},
    {"optimizer": "nadam", "lr": 0.001},
    {"optimizer": "adafactor"},
    {"optimizer": "muon"},
]


def begin(config: Config, worker: int, round: int = 1) -> RoundStart:
    """Every worker from weights of its own, so that a mix-up would show."""
    model = build_model(config.model, facts_of(config).classes, worker, precision=config.precision)
    return RoundStart(worker, round, model.state_dict(), {})


# LAMB (as Adam) steps as far even where the gradient is rounding noise, as that of a bias before BN is. BN
# takes the bias out of everything but its running mean; how other kernels round decides on both.
NOISE_OF_LAMB = ("conv1.bias", "conv2.bias", "bn1.running_mean", "bn2.running_mean")


def difference(one: RoundEnd, other: RoundEnd, but: Sequence[str] = ()) -> float:
    assert one.weights.keys() == other.weights.keys()
    assert one.state.keys() == other.state.keys()
    pairs = [(one.weights[name], other.weights[name]) for name in one.weights if name not in but]
    pairs += [(one.state[name], other.state[name]) for name in one.state]
    return max(float((a - b).abs().max()) for a, b in pairs)


def assert_same_rounds(
    config: Config,
    by_products: bool = False,
    but: Sequence[str] = (),
    workers: Sequence[int] = (3, 0, 2),
    rounds: int = 2,
) -> None:
    """A round from new weights and states, and the second from those after the first."""
    take_rounds = StackedWorkers(by_products).take_rounds
    starts = [begin(config, worker) for worker in workers]
    for _ in range(rounds):
        alone = [local_round.take_local_round(config, start) for start in starts]
        together = take_rounds(config, starts)
        for one, other in zip(alone, together, strict=True):
            assert list(one.weights) == list(other.weights)
            assert difference(one, other, but) < 1e-12
            assert one.loss == pytest.approx(other.loss, abs=1e-12)
            assert one.samples == other.samples
        starts = [RoundStart(s.worker, 2, end.weights, end.state) for s, end in zip(starts, alone, strict=True)]


@pytest.mark.parametrize(
    ("way", "model", "keys"),
    [
        *itertools.product(["groups"], [SMALL_BATCHNORM], OPTIMIZERS),
        *itertools.product(["groups"], ["lenet5"], OTHER_OPTIMIZERS),
        *itertools.product(["products"], ["lenet-bn"], OPTIMIZERS[:1]),
    ],
)
def test_all_at_once_is_one_by_one(small: Config, way: str, model: str, keys: dict[str, Any]) -> None:
    config = resolve(small.changed({"model": model, "precision": "fp64", "batch-size": 4, **keys}), "localsgd")
    assert_same_rounds(config, WAYS[way])


NARROW = {"precision": "fp64", "batch-size": 2, "local-steps": 2, "lr": 0.01, "dataset.images": 260}


@pytest.mark.parametrize("model", ["resnet20", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_a_resnet_at_once_is_one_by_one(small: Config, model: str) -> None:
    keys = {**NARROW, "model": model, "optimizer": "lars:trust=0.05", "augment.size": 16}
    assert_same_rounds(resolve(small.changed(keys), "localsgd"), workers=(1, 0), rounds=1)


def test_a_resnet_needs_no_code_of_its_own(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of torchvision's ResNet-18, with dropout, in its form for CIFAR: one more entry of the registry."""

    def resnet(classes: int) -> nn.Module:
        model = ResNet(BasicBlock, [1] * 4, classes, norm_layer=functools.partial(nn.GroupNorm, 8))
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        return nn.Sequential(nn.Dropout(0.2), model)

    register(monkeypatch, "lenet5", resnet)
    config = resolve(small.changed({**NARROW, "optimizer": "lamb", "augment.size": 16}), "localsgd")
    assert_same_rounds(config, workers=(1, 0), rounds=1)


def test_a_model_that_cannot_be_stacked_fails_and_says_why(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reversed(LeNet5):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flip(3))

    register(monkeypatch, "lenet5", Reversed)
    config = resolve(small.changed({"seed": 77}), "localsgd")
    with pytest.raises(UserError, match=r"model lenet5: cannot stack the method flip in .*: give --engine local"):
        StackedWorkers().take_rounds(config, [begin(config, worker) for worker in (0, 1)])


def test_a_mix_up_of_workers_would_be_seen(small: Config) -> None:
    config = resolve(small.changed({"precision": "fp64"}), "localsgd")
    alone = local_round.take_local_round(config, begin(config, 0))
    (other, _) = StackedWorkers().take_rounds(config, [begin(config, 1), begin(config, 0)])
    assert difference(alone, other) > 1e-3


def test_in_single_precision_they_differ_by_rounding_alone(small: Config) -> None:
    config = resolve(small.changed({"model": "lenet-bn", "local-steps": 1}), "localsgd")
    starts = [begin(config, worker) for worker in (0, 1)]
    alone = [local_round.take_local_round(config, start) for start in starts]
    pairs = zip(alone, StackedWorkers().take_rounds(config, starts), strict=True)
    assert max(difference(one, other) for one, other in pairs) < 1e-5
