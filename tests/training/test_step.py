from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedsim import device as pool
from fedsim.config import Config, Engine
from fedsim.data.datasets import task_of
from fedsim.data.image_sets import load_images
from fedsim.device import resolve
from fedsim.experiments.execute import execute
from fedsim.models import build_model
from fedsim.optim import build_optimizer
from fedsim.training.step import Learner, clip_gradients, evaluate, run_steps, step_inputs
from tests.conftest import final_model

CONFIG = Config(dataset="synthetic:images=1200", device="cpu", lr=0.1, momentum=0.0, weight_decay=0.0, batch_size=4)
TASK = task_of(CONFIG)


def test_steps_are_gradient_descent_and_the_loss_is_the_mean_over_samples() -> None:
    images = load_images(CONFIG).train
    linear = nn.Linear(3 * 32 * 32, 10, bias=False).double()
    weight = linear.weight.detach().clone()
    optimizer = build_optimizer(CONFIG, dict(linear.named_parameters()))
    rates = [0.005, 0.006, 0.007]
    inputs = step_inputs(CONFIG, 0, 0, rates, images, np.arange(9))
    loss = run_steps(Learner(nn.Sequential(nn.Flatten(), linear), optimizer, TASK, "fp64"), images, 4, inputs)
    losses = []
    for drawn, lr in zip(torch.split(inputs.drawn, 4, dim=1), rates, strict=True):
        crops, labels = images.batch(drawn, [0])
        weight.requires_grad_()
        value = F.cross_entropy(crops.double().flatten(1) @ weight.T, labels)
        (gradient,) = torch.autograd.grad(value, weight)
        weight = (weight - lr * gradient).detach()
        losses.append(float(value.detach()))
    torch.testing.assert_close(linear.weight.data, weight, rtol=0, atol=1e-13)
    assert loss == pytest.approx((4 * losses[0] + 4 * losses[1] + losses[2]) / 9, abs=1e-13)


def test_evaluation_is_the_mean_over_all_images_in_eval_mode() -> None:
    images = load_images(CONFIG).test
    model = build_model("lenet-bn", 10, 0)
    statistics = model.get_buffer("bn1.running_mean").clone()
    found = evaluate(TASK, model, images)
    inputs, labels = images.plain(0, len(images))
    with torch.no_grad():
        logits = model.eval()(inputs)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
    assert found["accuracy"] == float((logits.argmax(1) == labels).double().mean())
    assert torch.equal(model.get_buffer("bn1.running_mean"), statistics)


def test_evaluation_is_the_same_on_any_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    images = load_images(CONFIG).test
    model = build_model("lenet-bn", 10, 0)
    results = set()
    for cores in (1, 2, 3):
        monkeypatch.setattr(pool, "cpu_count", lambda cores=cores: cores)
        results.add(tuple(evaluate(TASK, model, images).values()))
    assert len(results) == 1


def test_a_gradient_that_is_longer_than_the_limit_is_scaled_down_to_it() -> None:
    """Of each replica in a stacked network by itself."""
    long, short = torch.full((2, 3), 2.0), torch.full((2, 3), 0.01)
    for replicas, of_each in ((1, [long]), (1, [short]), (2, [long, short])):
        stacked = nn.Linear(3, 2 * replicas).double()
        stacked.weight.grad, stacked.bias.grad = torch.cat(of_each).double(), torch.zeros(2 * replicas).double()
        clip_gradients(stacked, 1.0, replicas)
        norms = [float(part.norm()) for part in stacked.weight.grad.chunk(replicas)]
        assert norms == pytest.approx([min(float(part.norm()), 1.0) for part in of_each], rel=1e-6)


@pytest.mark.parametrize("engine", ["local", "stacked"])
def test_steps_are_no_longer_than_the_rate_times_the_limit(small: Config, engine: Engine) -> None:
    keys = {"momentum": 0.0, "weight-decay": 0.0, "lr": 1.0, "rounds": 1, "local-steps": 1, "clip-grad-norm": 1e-3}
    changed = execute(resolve(small.changed(keys), "localsgd"), "localsgd", engine)
    start = dict(build_model("lenet5", 10, small.seed).named_parameters())
    moved = [(final_model(changed)[name] - value.detach()).double().flatten() for name, value in start.items()]
    assert 0 < float(torch.cat(moved).norm()) <= 1.001e-3
