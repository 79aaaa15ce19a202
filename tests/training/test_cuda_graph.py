"""Steps out of static buffers are `run_steps`; what a CUDA graph adds to them is tested in test_gpu.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.data.datasets import load_dataset, task_of
from fedsim.data.image_sets import facts_of
from fedsim.models import build_model
from fedsim.optim import build_optimizer, load_optimizer_state, optimizer_state
from fedsim.rng import generator
from fedsim.training.cuda_graph import CapturedSteps
from fedsim.training.gradient_terms import gradient_terms
from fedsim.training.methods import layers_of
from fedsim.training.step import Learner, run_steps, step_inputs
from tests.conftest import SMALL_BATCHNORM

SAMPLES, BATCH = 10, 4  # the last batch is smaller
OPTIMIZERS: list[dict[str, Any]] = [
    {"optimizer": "sgdm"},
    {"optimizer": "sgdm:nesterov=true", "decay-biases-and-norms": False},
    {"optimizer": "sgdm", "momentum": 0.0},
    {"optimizer": "lars:trust=0.05", "decay-biases-and-norms": False},
    {"optimizer": "lars:lr-in-momentum=true"},
    {"optimizer": "lamb", "decay-biases-and-norms": False},
    {"optimizer": "lamb:bias-correction=moments"},
    {"optimizer": "adamw", "local-rule": "scaffold"},
    {"optimizer": "lars:lr-in-momentum=true", "local-rule": "fedprox:mu=0.5"},
]


def rounds(
    config: Config,
    static: bool,
    capture: bool = False,
    steps_in: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> dict[str, Tensor]:
    """All that is left of three rounds, the last with a new optimizer's state: losses, weights, state.

    The steps, without the wait for their losses, run in the context `steps_in`.
    """
    config = config.changed({"batch-size": BATCH, "seed": 1})
    images = load_dataset(config).train
    model = build_model(config.model, facts_of(config).classes, 0, config.device, config.precision)
    named = dict(model.named_parameters())
    optimizer, terms = build_optimizer(config, named), gradient_terms(named, layers_of(config).terms)
    learner = Learner(model, optimizer, task_of(config), config.precision, terms)
    simple = partial(run_steps, learner, images, BATCH)
    if static:
        steps = CapturedSteps(learner, images, SAMPLES, BATCH, capture)
        if not capture:
            steps.warm_up()
    losses, correction = [], {name: p.detach() / 100 for name, p in named.items()}
    for round in range(3):
        if terms:
            terms.begin(correction)
        if round == 2:
            load_optimizer_state(named, optimizer, {})
        samples, rates = SAMPLES, [2**-7, 2**-6 / 2**round, 3 * 2**-7]  # exact in float32, as captured steps read them
        if round == 1:  # a shorter one
            samples, rates = SAMPLES - BATCH, rates[:-1]
        order = generator(1, 0, round, "shuffle").permutation(len(images))[:samples]
        inputs = step_inputs(config, 0, 3 * round, rates, images, order)
        with steps_in():
            loss = steps.run([inputs]) if static else simple(inputs)
        losses.append(float(loss))
        correction = terms.end(len(rates)) if terms else {}
    return {"losses": torch.tensor(losses), **model.state_dict(), **optimizer_state(named, optimizer)}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], within: float) -> None:
    assert one.keys() == other.keys()
    differences = {name: float((value - other[name]).abs().max()) for name, value in one.items()}
    wrong = {name: difference for name, difference in differences.items() if not difference <= within}
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("model", "precision", "keys"),
    [
        *(("lenet5", "fp64", keys) for keys in OPTIMIZERS),
        (SMALL_BATCHNORM, "fp32", OPTIMIZERS[0]),
        (SMALL_BATCHNORM, "bf16", OPTIMIZERS[0]),
    ],
)
def test_captured_steps_are_run_steps(small: Config, model: str, precision: str, keys: dict[str, Any]) -> None:
    """Bit for bit, but where LARS multiplies by the rate in another order."""
    config = small.changed({"model": model, "precision": precision, **keys})
    one, other = rounds(config, static=False), rounds(config, static=True)
    if keys["optimizer"].startswith("lars") and "lr-in-momentum" not in keys["optimizer"]:
        assert_close(one, other, {"fp32": 1e-5, "fp64": 1e-12}[precision])
    else:
        assert_close(one, other, 0)


def test_another_momentum_would_be_seen(small: Config) -> None:
    one = rounds(small, static=True)
    with pytest.raises(AssertionError, match="losses"):
        assert_close(one, rounds(small.changed({"momentum": 0.8}), static=True), 1e-4)


@pytest.mark.parametrize("keys", OPTIMIZERS)
def test_warming_up_leaves_no_mark_but_the_zeros_of_a_new_state(small: Config, keys: dict[str, Any]) -> None:
    config = small.changed(keys)
    model = build_model(SMALL_BATCHNORM, 10, 0)
    named = dict(model.named_parameters())
    optimizer = build_optimizer(config, named)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    places = {name: value.data_ptr() for name, value in model.state_dict().items()}
    learner = Learner(model, optimizer, task_of(config), "fp32")
    steps = CapturedSteps(learner, load_dataset(config).train, SAMPLES, BATCH)
    steps.warm_up()
    assert_close(before, model.state_dict(), 0)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == places
    state = optimizer_state(named, optimizer)
    assert bool(state) == (config.optimizer == "lamb" or config.momentum > 0)
    assert not any(value.any() for value in state.values())
