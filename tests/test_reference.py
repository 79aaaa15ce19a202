"""Every engine in this process trains as the reference does, in float64."""

from __future__ import annotations

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
from fedsim.reference import local_sgd
from fedsim.training.local_round import Start, round_inputs
from fedsim.training.run_plan import run_plan
from tests.conftest import final_model

ROUNDS, STEPS, WORKERS, BATCH = 3, 3, 3, 8


def reference(config: Config) -> dict[str, Tensor]:
    """The model that the reference trains from the same weights on the same batches."""
    images = load_dataset(config).train
    plan = run_plan(config, len(images))
    model = build_model(config.model, config.synthetic_classes, config.seed, precision=config.precision)
    step_keys = StepKeys()

    def use_keys(layer: Dropout, _: Any) -> None:
        layer.keys = step_keys  # in a copy of the model too

    def batch(worker: int, step: int) -> tuple[Tensor, Tensor]:
        inputs = round_inputs(config, Start(worker, 1 + step // STEPS, {}, {}))
        part = slice(step % STEPS * BATCH, (step % STEPS + 1) * BATCH)
        step_keys.begin_step(inputs.dropout_keys[step % STEPS])
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
        ROUNDS,
        STEPS,
        **keep,  # type: ignore[arg-type]
    )
    return model.state_dict()


@pytest.mark.parametrize("engine", ["fleet", "fused"])
@pytest.mark.parametrize(
    "keys",
    [
        {"momentum-at-sync": "keep"},
        {"momentum-at-sync": "reset", "reshuffle": "round"},
        {"momentum-at-sync": "average", "nesterov": True},
        {"batchnorm-at-sync": "worker-0", "schedule": "cosine"},
        {"optimizer": "lars", "decay-on": "matrices", "trust-coefficient": 0.05, "momentum-at-sync": "average"},
        {"optimizer": "lamb", "model": "lenet5"},
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
    worker_0 = reference(config.changed({"batchnorm-at-sync": "worker-0"}))
    assert float((worker_0["bn1.running_mean"] - keep["bn1.running_mean"]).abs().max()) > 1e-4
