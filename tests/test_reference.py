"""Every engine in this process trains as the oracle of all methods does, in float64, and that as `fedsim.reference`.

The models of the paper once each; the rest with two layers on crops of 12 x 12 pixels, with BatchNorm and dropout or
without.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedsim.reference as simple
from fedsim.config import Config, Engine
from fedsim.device import CORES, resolve
from fedsim.experiments.execute import execute
from tests import oracle
from tests.conftest import assert_same_bits, final_model
from tests.reference_run import covers, reference

SHAPE: dict[str, Any] = {
    "clients": 3,
    "local-steps": 3,
    "rounds": 3,
    "batch-size": 8,
    "dataset.images": 120,
    "augment": "crop:size=12+mirror",
    "precision": "fp64",
    "lr": 0.05,
}
ENGINES: tuple[Engine, ...] = ("local", "stacked")
OF_THE_PAPER = {
    "clients": 2,
    "local-steps": 2,
    "rounds": 2,
    "batch-size": 4,
    "augment": "crop+mirror",
}  # on whole images
PLAIN, BATCHNORM = "tests.own_code:plain", "tests.own_code:batchnorm"


@pytest.mark.parametrize(
    "keys",
    [
        {**OF_THE_PAPER, "model": "lenet-bn"},
        {"momentum-at-sync": "keep"},
        {"momentum-at-sync": "reset", "shuffle-every": "round"},
        {"momentum-at-sync": "average", "optimizer.nesterov": True},
        {"batchnorm-at-sync": "local", "schedule": "cosine"},
        {"batchnorm-at-sync": "pooled", "compress-down": "topk:ratio=0.1"},
        {"batchnorm-at-sync": "re-estimated:images=100"},
        {"optimizer": "lars:trust=0.05", "decay-biases-and-norms": False, "momentum-at-sync": "average"},
        {**OF_THE_PAPER, "model": "lenet5", "optimizer": "lamb"},
        {"model": PLAIN, "augment": "center:size=12+tests.own_code:erase", "normalize": "none"},
        {"model": PLAIN, "local-steps-schedule": "table:epochs=0.5/0.7,steps=1/4", "record-by": "epoch"},
        {"model": PLAIN, "compress": "topk:ratio=0.1", "outer": "slowmo"},
        {"model": PLAIN, "compress": "topk:ratio=0.29", "error-feedback": False},
        {"model": PLAIN, "compress": "randomk:ratio=0.1", "fraction": 0.67},
        {"model": PLAIN, "compress": "qsgd", "momentum-at-sync": "average"},
        {"model": PLAIN, "compress": "powersgd:rank=2"},
        {"model": PLAIN, "compress-down": "powersgd:rank=2"},
        {"model": PLAIN, "compress-down": "qsgd"},
        {"model": PLAIN, "mean": "clipped", "compress": "qsgd", "outer": "fedavgm"},
        {"model": PLAIN, "compress": "topk:ratio=0.1", "compress-down": "topk:ratio=0.1", "outer": "slowmo"},
        {"model": PLAIN, "outer": "slowmo", "schedule": "cosine", "momentum-at-sync": "reset"},
        {"model": PLAIN, "local-rule": "fedprox:mu=0.5", "optimizer": "lars:trust=0.05"},
        {"model": PLAIN, "local-rule": "scaffold", "optimizer.nesterov": True},
        {"model": PLAIN, "local-rule": "scaffold-inferred", "momentum": 0.0, "weight-decay": 0.0},
        {"layer": "delay", "optimizer.nesterov": True, "outer": "slowmo", "local-rule": "fedprox:mu=0.5"},
        {"local-epochs": 1, "local-steps": 10, "model": PLAIN, "dataset.images": 126, "local-rule": "scaffold"},
        {"layer": "delay", "compress": "topk:ratio=0.1", "model": PLAIN, "momentum-at-sync": "reset"},
        {"model": PLAIN, "local-rule": "scaffold", "optimizer": "adamw:betas=0.8/0.9"},
        {"outer": "fedadam:lr=0.01,eps=0.01,bias-correction=true", "batchnorm-at-sync": "first-worker"},
    ],
)
def test_the_engines_are_the_reference(small: Config, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]) -> None:
    monkeypatch.setenv(CORES, "1")  # so that all clients are stacked
    config = resolve(small.changed({"model": BATCHNORM, **SHAPE, **keys}), "localsgd")
    assert covers(config)
    expected = reference(config)
    for engine in ENGINES:
        trained = final_model(execute(config.changed({"name": engine}), "localsgd", engine))
        assert trained.keys() == expected.keys()
        for name, value in trained.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("momentum_at_sync", ["keep", "reset", "average"])
def test_the_oracle_is_the_reference(momentum_at_sync: Any) -> None:
    images = torch.randn(3, 9, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.randint(10, (3, 9, 4), generator=torch.Generator().manual_seed(1))

    def batch(worker: int, step: int) -> tuple[Tensor, Tensor]:
        return images[worker, step], labels[worker, step]

    def sgdm(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    ours = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).double()
    theirs, before = copy.deepcopy(ours), copy.deepcopy(ours)
    plan: dict[str, Any] = {"workers": 3, "local_steps": [2, 3, 1], "momentum_at_sync": momentum_at_sync}
    simple.local_sgd(ours, sgdm, batch, **plan)
    oracle.local_sgd(theirs, sgdm, batch, lambda step: 0.1, **plan)
    assert_same_bits(ours.state_dict(), theirs.state_dict())
    assert not torch.equal(ours.state_dict()["4.weight"], before.state_dict()["4.weight"])


def test_the_choices_differ(small: Config) -> None:
    """What the test above compares would show a wrong choice."""
    config = small.changed({"model": BATCHNORM, **SHAPE})
    keep = reference(config)
    for other in ({"momentum-at-sync": "reset"}, {"momentum-at-sync": "average"}):
        assert float((reference(config.changed(other))["5.weight"] - keep["5.weight"]).abs().max()) > 1e-6
    worker_0 = reference(config.changed({"batchnorm-at-sync": "first-worker"}))
    assert float((worker_0["1.running_mean"] - keep["1.running_mean"]).abs().max()) > 1e-4
    pooled = reference(config.changed({"batchnorm-at-sync": "pooled"}))
    assert float((pooled["1.running_var"] - keep["1.running_var"]).min()) > 0
    down = reference(config.changed({"compress-down": "topk"}))
    assert float((down["5.weight"] - keep["5.weight"]).abs().max()) > 1e-6
