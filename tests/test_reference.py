"""Every engine in this process trains as the reference does, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsim.config import Config
from fedsim.device import resolve
from fedsim.experiments.execute import execute
from tests.conftest import final_model
from tests.reference_run import covers, reference

ROUNDS, STEPS, WORKERS, BATCH = 3, 3, 3, 8


@pytest.mark.parametrize("engine", ["threads", "stacked"])
@pytest.mark.parametrize(
    "keys",
    [
        {"momentum-at-sync": "keep"},
        {"momentum-at-sync": "reset", "shuffle-every": "round"},
        {"momentum-at-sync": "average", "nesterov": True},
        {"batchnorm-at-sync": "local", "schedule": "cosine"},
        {"batchnorm-at-sync": "pooled", "compress-down": "topk", "compress-ratio": 0.1},
        {"batchnorm-at-sync": "re-estimated", "batchnorm-images": 100},
        {
            "optimizer": "lars",
            "decay-biases-and-norms": False,
            "trust-coefficient": 0.05,
            "momentum-at-sync": "average",
        },
        {"optimizer": "lamb", "model": "lenet5"},
        {"model": "lenet5", "local-steps-schedule": "table", "local-steps-table": "0.5:1,0.7:4", "record-by": "epoch"},
        {"model": "lenet5", "compress": "topk", "compress-ratio": 0.1, "outer": "slowmo"},
        {"model": "lenet5", "compress": "topk", "compress-ratio": 0.29, "error-feedback": False},
        {"model": "lenet5", "compress": "randomk", "compress-ratio": 0.1, "fraction": 0.67},
        {"model": "lenet5", "compress": "qsgd", "momentum-at-sync": "average"},
        {"model": "lenet5", "compress": "powersgd", "compress-rank": 2},
        {"model": "lenet5", "compress-down": "powersgd", "compress-rank": 2},
        {"model": "lenet5", "compress-down": "qsgd"},
        {"model": "lenet5", "mean": "clipped", "compress": "qsgd", "outer": "fedavgm"},
        {
            "model": "lenet5",
            "compress": "topk",
            "compress-down": "topk",
            "compress-ratio": 0.1,
            "outer": "slowmo",
        },
        {"model": "lenet5", "outer": "slowmo", "schedule": "cosine", "momentum-at-sync": "reset"},
        {"model": "lenet5", "local-rule": "fedprox", "prox-mu": 0.5, "optimizer": "lars", "trust-coefficient": 0.05},
        {"model": "lenet5", "local-rule": "scaffold", "nesterov": True},
        {"model": "lenet5", "local-rule": "scaffold-inferred", "momentum": 0.0, "weight-decay": 0.0},
        {"delay": 1, "nesterov": True, "outer": "slowmo", "local-rule": "fedprox", "prox-mu": 0.5},
        {"local-epochs": 1, "local-steps": 10, "model": "lenet5", "synthetic-images": 126, "local-rule": "scaffold"},
        {"delay": 1, "model": "lenet5", "compress": "topk", "compress-ratio": 0.1, "momentum-at-sync": "reset"},
        {"model": "lenet5", "local-rule": "scaffold", "optimizer": "adamw", "optimizer-args": "betas=0.8:0.9"},
        {
            "outer": "fedadam",
            "outer-args": "lr=0.01, eps=0.01, bias_correction=true",
            "batchnorm-at-sync": "first-worker",
        },
    ],
)
def test_an_engine_is_the_reference(small: Config, engine: Any, keys: dict[str, Any]) -> None:
    shape = {"clients": WORKERS, "local-steps": STEPS, "rounds": ROUNDS, "batch-size": BATCH, "synthetic-images": 120}
    config = resolve(small.changed({"model": "lenet-bn", "precision": "fp64", "lr": 0.05, **shape, **keys}), "localsgd")
    assert covers(config)
    trained, expected = final_model(execute(config, "localsgd", engine)), reference(config)
    assert trained.keys() == expected.keys()
    for name, value in trained.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)


def test_the_choices_differ(small: Config) -> None:
    """What the test above compares would show a wrong choice."""
    shape = {"clients": WORKERS, "local-steps": STEPS, "rounds": ROUNDS, "batch-size": BATCH, "synthetic-images": 120}
    config = small.changed({"model": "lenet-bn", "precision": "fp64", "lr": 0.05, **shape})
    keep = reference(config)
    for other in ({"momentum-at-sync": "reset"}, {"momentum-at-sync": "average"}):
        assert float((reference(config.changed(other))["fc3.weight"] - keep["fc3.weight"]).abs().max()) > 1e-6
    worker_0 = reference(config.changed({"batchnorm-at-sync": "first-worker"}))
    assert float((worker_0["bn1.running_mean"] - keep["bn1.running_mean"]).abs().max()) > 1e-4
    pooled = reference(config.changed({"batchnorm-at-sync": "pooled"}))
    assert float((pooled["bn1.running_var"] - keep["bn1.running_var"]).min()) > 0
    down = reference(config.changed({"compress-down": "topk"}))
    assert float((down["fc3.weight"] - keep["fc3.weight"]).abs().max()) > 1e-6
