"""Every engine in this process trains as the reference does, in float64."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.data.datasets import load_dataset
from fedsim.device import resolve
from fedsim.experiments.execute import execute
from fedsim.models import build_model
from fedsim.models.dropout import Dropout, StepKeys
from fedsim.optim import build_optimizer
from fedsim.reference import Compress, Outer, Tensors, local_sgd, reestimate
from fedsim.training.batchnorm import BATCH as CALIBRATION_BATCH
from fedsim.training.batchnorm import calibration_crops
from fedsim.training.local_round import Start, round_inputs
from fedsim.training.run_plan import run_plan
from tests.conftest import final_model

ROUNDS, STEPS, WORKERS, BATCH = 3, 3, 3, 8


def slowmo() -> Outer:
    """Wang et al. 2020, with the defaults of the key: alpha = 1, beta = 0.5."""
    u: dict[str, Tensor | float] = {}

    def step(x: Tensors, mean: Tensors, lr: float) -> Tensors:
        for name in x:
            u[name] = 0.5 * u.get(name, 0.0) + (x[name] - mean[name]) / lr
        return {name: x[name] - lr * u[name] for name in x}

    return step


def fedadam() -> Outer:
    """Reddi et al. 2021, with Kingma's bias correction, eta = 0.01, betas = 0.9 and 0.99, tau = 0.01."""
    m: dict[str, Tensor | float] = {}
    v: dict[str, Tensor | float] = {}
    rounds = itertools.count(1)

    def step(x: Tensors, mean: Tensors, lr: float) -> Tensors:
        t, after = next(rounds), {}
        for name in x:
            gradient = x[name] - mean[name]
            m[name] = 0.9 * m.get(name, 0.0) + 0.1 * gradient
            v[name] = 0.99 * v.get(name, 0.0) + 0.01 * gradient**2
            after[name] = x[name] - 0.01 * m[name] / (1 - 0.9**t) / ((v[name] / (1 - 0.99**t)) ** 0.5 + 0.01)
        return after

    return step


def topk(update: Tensors) -> Tensors:
    """The tenth of each tensor's values that is largest, at least one (Stich et al. 2018)."""
    least = {name: value.abs().flatten().sort().values[-max(1, value.numel() // 10)] for name, value in update.items()}
    return {name: torch.where(value.abs() >= least[name], value, 0.0) for name, value in update.items()}


COMPRESS: dict[str, Compress | None] = {"none": None, "topk": topk}
OUTER: dict[str, Callable[[], Outer | None]] = {"none": lambda: None, "slowmo": slowmo, "fedadam": fedadam}


def reference(config: Config) -> dict[str, Tensor]:
    """The model that the reference trains from the same weights on the same batches."""
    images = load_dataset(config).train
    plan = run_plan(config, len(images))
    model = build_model(config.model, config.synthetic_classes, config.seed, precision=config.precision)
    step_keys = StepKeys()

    def use_keys(layer: Dropout, _: Any) -> None:
        layer.keys = step_keys  # in a copy of the model too

    def batch(worker: int, step: int) -> tuple[Tensor, Tensor]:
        round_ = bisect.bisect_right(plan.starts, step)
        inputs = round_inputs(config, Start(worker, round_, {}, {}))
        local_step = step - plan.first_step(round_)
        part = slice(local_step * BATCH, (local_step + 1) * BATCH)
        step_keys.begin_step(inputs.dropout_keys[local_step])
        index, *crop = inputs.crops[:, part]
        return images.crop(index, *crop).double(), images.labels[index]

    for layer in model.modules():
        if isinstance(layer, Dropout):
            layer.register_forward_pre_hook(use_keys)
    keep = {"momentum_at_sync": config.momentum_at_sync, "batchnorm_at_sync": config.batchnorm_at_sync}
    local_sgd(
        model,
        lambda replica: build_optimizer(config, dict(replica.named_parameters())),
        batch,
        plan.lr,
        WORKERS,
        [plan.steps(round_) for round_ in range(1, plan.rounds + 1)],
        compress=COMPRESS[config.compress],
        compress_down=COMPRESS[config.compress_down],
        error_feedback=config.error_feedback,
        outer=OUTER[config.outer](),
        prox_mu=config.prox_mu if config.local_rule == "fedprox" else 0.0,
        scaffold=config.local_rule == "scaffold",
        delay=bool(config.delay),
        **keep,  # type: ignore[arg-type]
    )
    if config.batchnorm_at_sync == "re-estimated":
        crops = torch.split(calibration_crops(config, images), CALIBRATION_BATCH, dim=1)
        reestimate(model, (images.crop(*batch).double() for batch in crops))
    return model.state_dict()


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
        {"model": "lenet5", "compress": "topk", "compress-ratio": 0.1, "error-feedback": False},
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
