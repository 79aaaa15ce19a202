"""The shortest time that a device could take for a round, from its rates and the operators of a step.

An operator takes at least the time of its floating-point operations at the rate of a matrix product, or that of its
bytes at the rate of the memory, whichever is longer (the roofline model, Williams et al. 2009). A round of LocalSGD is
J steps of K models at batch B, where each model is written once, from the global one, and read once, for the mean.
Centralized training is J steps of one model at batch K * B. K models read and write K times the weights, so that the
best rate of LocalSGD is below that of centralized training. Kernels that fuse operators, or find their inputs in a
cache, could be faster than the bound.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fedsim.bench.operators import Operator, Operators
from fedsim.bench.variants import timed
from fedsim.config import Config, cpu_count
from fedsim.data.datasets import facts_of, moments_of
from fedsim.data.images import Images
from fedsim.device import set_tf32
from fedsim.models import initial_model
from fedsim.optim import build_optimizer
from fedsim.training.cuda_graph import CapturedSteps
from fedsim.training.step import StepInputs

PRODUCTS = {"fp64": torch.float64, "bf16": torch.bfloat16}  # else float32


class Rates(NamedTuple):
    """What a device does in a second."""

    flop: float  # in matrix products
    bytes: float  # read and written


def measure_rates(device: str, precision: str) -> Rates:
    """The best of ten large matrix products in `precision`, and of ten copies, on `device`."""
    on_cpu = device == "cpu"
    torch.set_num_threads(cpu_count())
    set_tf32(precision)
    size = 2048 if on_cpu else 8192
    one = torch.randn(size, size, device=device, dtype=PRODUCTS.get(precision, torch.float32))
    product = min(timed(lambda: one @ one, 10, device))
    source = torch.zeros(2**28 if on_cpu else 2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = min(timed(lambda: target.copy_(source), 10, device))
    return Rates(2 * size**3 / product, 2 * source.nbytes / copy)


@functools.lru_cache(maxsize=64)
def step_operators(config: Config, batch: int) -> list[Operator]:
    """The operators of one captured step of one model at a batch size, found without computing or allocating."""
    pixels, labels = np.zeros((1, *facts_of(config).shape), np.uint8), np.zeros(1, np.int64)
    inputs = StepInputs(torch.zeros(4, batch, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), [0.0])
    model = initial_model(config.changed({"device": "cpu"}))
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = Images(pixels, labels, moments_of(config), "cpu", config.crop_padding, config.crop_size)
        values = {n: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype) for n, v in model.state_dict().items()}
        model.load_state_dict(values, assign=True)
        optimizer = build_optimizer(config, dict(model.named_parameters()))
        steps = CapturedSteps(model, optimizer, images, batch, batch, config.precision)
        for operators in (Operators(), second := Operators()):  # the first step creates the optimizer's state
            with operators:
                steps.run([inputs])
    return second.called


def seconds(operators: list[Operator], rates: Rates) -> float:
    """The least seconds for `operators`, one after the other."""
    return sum(max(one.flop / rates.flop, one.bytes / rates.bytes) for one in operators)


def bound(config: Config, rates: Rates, centralized: bool) -> float:
    """The least seconds of a round of `config`, by LocalSGD or by `centralized` steps on the same images."""
    # torch-optimizer's LARS and LAMB read values, which fake tensors do not have; fedsim's compute the same
    single = config.changed({"device": "cpu", "optimizer-backend": "fedsim", "clients": 1, "threads": 1})
    if centralized:
        return config.local_steps * seconds(step_operators(single, config.clients * config.batch_size), rates)
    step = config.clients * seconds(step_operators(single, config.batch_size), rates)
    model = initial_model(single)
    weights: int = sum(value.nbytes for value in model.state_dict().values())
    return config.local_steps * step + 2 * config.clients * weights / rates.bytes
