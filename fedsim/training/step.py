"""The one training step of both modes, and the test of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from fedsim.data.images import Images, batches
from fedsim.device import products_in, thread_pool
from fedsim.errors import RunFailed
from fedsim.models.dropout import StepKeys, set_dropout_keys
from fedsim.optim import set_lr
from fedsim.rng import random_words, step_keys
from fedsim.training.gradient_terms import GradientTerms

TEST_BATCH = 250  # images on a CPU; larger ones outgrow a core's cache
GPU_TEST_BATCH = 2500  # smaller ones leave a GPU waiting for their launches


@dataclass(frozen=True)
class StepInputs:
    """What consecutive local steps of one worker read: which images, how each is augmented, and the learning rates.

    `crops`: (4, samples) on the CPU, the arguments of `Images.crop`; a step takes the next batch of its columns, the
    last one may be smaller. `dropout_keys`: (steps,) int64, and `rates` and `augment_keys`: one number, for each step.
    """

    crops: Tensor
    dropout_keys: Tensor
    rates: Sequence[float]
    augment_keys: Sequence[int]


def step_inputs(
    index: NDArray[np.int64],
    batch_size: int,
    seed: int,
    worker: int,
    first_step: int,
    rates: Sequence[float],
    images: Images,
) -> StepInputs:
    """The inputs of the steps `first_step`, `first_step` + 1, ... of a worker on those `images` that `index` lists."""
    augment_keys = step_keys(seed, worker, first_step, len(rates), "augment")
    keys = step_keys(seed, worker, first_step, len(rates), "dropout")
    crops = images.sample(index, random_words(augment_keys, batch_size).reshape(-1)[: len(index)])
    return StepInputs(crops, torch.from_numpy(keys.view(np.int64)), rates, augment_keys.tolist())


def run_steps(
    model: nn.Module,
    optimizer: Optimizer,
    images: Images,
    batch_size: int,
    precision: str,
    terms: GradientTerms | None,
    inputs: StepInputs,
) -> float:
    """Run one optimizer step for each batch of `inputs`; returns the mean training loss over all samples.

    The loss of a batch is the one before its step, in train mode. The device is waited for once, at the end.
    """
    model.train()
    parameter = next(model.parameters())
    step_keys = StepKeys(device=parameter.device)
    set_dropout_keys(model, step_keys)
    losses, sizes = [], []
    drawn = batches(images, inputs.crops, batch_size)
    keys = zip(inputs.rates, inputs.dropout_keys, inputs.augment_keys, strict=True)
    for (crops, labels), (lr, key, augment_key) in zip(drawn, keys, strict=True):
        crops = images.augmented(crops, [augment_key])
        step_keys.begin_step(key)
        set_lr(optimizer, lr)
        losses.append(take_step(model, optimizer, crops.to(parameter.dtype), labels, precision, terms=terms))
        sizes.append(len(labels))
    sums = torch.stack(losses).double().cpu() * torch.tensor(sizes)
    return float(sums.sum()) / sum(sizes)


def take_step(
    model: nn.Module,
    optimizer: Optimizer,
    images: Tensor,
    labels: Tensor,
    precision: str,
    replicas: int = 1,
    terms: GradientTerms | None = None,
) -> Tensor:
    """One optimizer step on a batch; returns its mean loss before the step, without synchronizing.

    For a stacked network of K `replicas`, `labels` are (K * B,) and the losses (K,).
    """
    model.zero_grad()
    with products_in(precision, images.device):
        logits = model(images)
        if replicas == 1:
            losses = F.cross_entropy(logits, labels)
        else:
            each = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
            losses = each.view(replicas, -1).mean(1)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    if terms:
        terms.add()
    optimizer.step()
    return losses.detach()


def evaluate(model: nn.Module, images: Images, precision: str = "fp32") -> tuple[float, float]:
    """Mean cross-entropy and accuracy (a fraction) of `model`, in eval mode, over all `images`.

    On the CPU each core tests batches of its own on one thread, so that the result is the same on any number. Raises
    RunFailed where the loss is not finite: the accuracy of such a model has no meaning.
    """
    model.eval()
    parameter = next(model.parameters())
    batch = TEST_BATCH if parameter.device.type == "cpu" else GPU_TEST_BATCH

    @torch.inference_mode()
    def test(start: int) -> Tensor:
        inputs, labels = images.plain(start, start + batch)
        with products_in(precision, parameter.device):
            logits = model(inputs.to(parameter.dtype))
            loss_sum = F.cross_entropy(logits, labels, reduction="sum")
        return torch.stack([loss_sum.double(), (logits.argmax(1) == labels).sum().double()])

    starts = range(0, len(images), batch)
    if parameter.device.type == "cpu":
        with thread_pool(parameter.device, threads=1) as pool:
            sums = list(pool.map(test, starts))
    else:  # in this thread, whose convolution plans cuDNN remembers
        sums = list(map(test, starts))
    loss, correct = sum(sums[1:], sums[0]).tolist()
    if not math.isfinite(loss):
        raise RunFailed(f"the loss of the model in a test is {loss}: a lower --lr may help, if its eval mode is right")
    return loss / len(images), correct / len(images)
