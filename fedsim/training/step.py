"""The one training step of both modes, and the test of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from fedsim.config import Config
from fedsim.data.client_shares import ClientShares
from fedsim.data.task import Batch, Examples, Task, with_floats
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
    """What consecutive local steps of one worker read: which examples, what is drawn for each, and the learning rates.

    `drawn`: of `Examples.sample`, (draws, samples) on the CPU; a step takes the next batch of its columns, the last one
    may be smaller. `dropout_keys`: (steps,) int64, and `rates` and `augment_keys`: one number, for each step.
    """

    drawn: Tensor
    dropout_keys: Tensor
    rates: Sequence[float]
    augment_keys: Sequence[int]


@dataclass(frozen=True)
class Learner:
    """What a local step changes, and how: a model or a stacked network of K `replicas`, its optimizer and its task."""

    model: nn.Module
    optimizer: Optimizer
    task: Task
    precision: str
    terms: GradientTerms | None = None
    replicas: int = 1
    clip: float = 0.0  # the largest norm of a replica's gradient; 0: any


def step_inputs(
    config: Config, worker: int, first_step: int, rates: Sequence[float], examples: Examples, index: NDArray[np.int64]
) -> StepInputs:
    """What a worker reads in the steps `first_step`, `first_step` + 1, ... on those `examples` that `index` lists."""
    augment_keys = step_keys(config.seed, worker, first_step, len(rates), "augment")
    keys = step_keys(config.seed, worker, first_step, len(rates), "dropout")
    drawn = examples.sample(index, random_words(augment_keys, config.batch_size).reshape(-1)[: len(index)])
    return StepInputs(drawn, torch.from_numpy(keys.view(np.int64)), rates, augment_keys.tolist())


def run_steps(learner: Learner, examples: Examples, batch_size: int, inputs: StepInputs) -> float:
    """Run one optimizer step for each batch of `inputs`; returns the mean training loss over all samples.

    The loss of a batch is the one before its step, in train mode. The device is waited for once, at the end.
    """
    learner.model.train()
    parameter = next(learner.model.parameters())
    step_keys = StepKeys(device=parameter.device)
    set_dropout_keys(learner.model, step_keys)
    losses, sizes = [], list[int]()
    batches = torch.split(inputs.drawn.to(examples.device), batch_size, dim=1)
    keys = zip(inputs.rates, inputs.dropout_keys, inputs.augment_keys, strict=True)
    for drawn, (lr, key, augment_key) in zip(batches, keys, strict=True):
        batch = examples.batch(drawn, [augment_key])
        step_keys.begin_step(key)
        set_lr(learner.optimizer, lr)
        losses.append(take_step(learner, with_floats(batch, parameter.dtype)))
        sizes.append(drawn.shape[1])
    sums = torch.stack(losses).double().cpu() * torch.tensor(sizes)
    return float(sums.sum()) / sum(sizes)


def take_step(learner: Learner, batch: Batch) -> Tensor:
    """One optimizer step on a batch; returns its mean loss before the step, without synchronizing.

    For a stacked network of K `replicas` the losses are (K,).
    """
    task, targets = learner.task, batch[1]
    learner.model.zero_grad()
    with products_in(learner.precision, targets.device):
        outputs = task.forward(learner.model, batch)
        alone = learner.replicas == 1
        losses = task.loss(outputs, targets) if alone else task.losses(outputs, targets, learner.replicas)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    if learner.clip:
        clip_gradients(learner.model, learner.clip, learner.replicas)
    if learner.terms:
        learner.terms.add()
    learner.optimizer.step()
    return losses.detach()


def clip_gradients(model: nn.Module, limit: float, replicas: int) -> None:
    """Scale the gradient of each replica down to the norm `limit`, without synchronizing."""
    if replicas == 1:
        nn.utils.clip_grad_norm_(model.parameters(), limit)
        return
    gradients = [p.grad.view(replicas, -1, *p.shape[1:]) for p in model.parameters() if p.grad is not None]
    squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients])
    factors = (limit / (squares.sum(0).sqrt() + 1e-6)).clamp(max=1)  # as of torch's clip_grad_norm_
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))


def evaluate(
    task: Task,
    model: nn.Module,
    examples: Examples,
    precision: str = "fp32",
    metrics: Mapping[str, Callable[[Any, Tensor], Tensor]] | None = None,
    shares: ClientShares | None = None,
) -> dict[str, Any]:
    """The mean of the loss and of each metric of `task` over all `examples`, of `model` in eval mode.

    Of the other `metrics` too, which give a value for each example, or C values, of which the means are a list: NaN is
    no value, and the mean of none is None. With `shares` of the examples, `clients` is the list of the means of the
    task's metric over each client's share.

    On the CPU each core tests batches of its own on one thread, so that the result is the same on any number. Raises
    RunFailed where the loss or a metric is not finite: the others of such a model have no meaning.
    """
    model.eval()
    parameter = next(model.parameters())
    batch = TEST_BATCH if parameter.device.type == "cpu" else GPU_TEST_BATCH

    @torch.inference_mode()
    def test(start: int) -> dict[str, Tensor]:
        part = with_floats(examples.plain(start, start + batch), parameter.dtype)
        with products_in(precision, parameter.device):
            outputs = task.forward(model, part)
            values = {name: metric(outputs, part[1]) for name, metric in (metrics or {}).items()}
            if shares:
                owners = shares.owners[start : start + batch]
                values["clients"] = in_columns(task.values(outputs, part[1]), owners, shares.clients)
            of_task = task.sums(outputs, part[1])
        sums = {name: torch.stack([total, torch.full_like(total, len(part[1]))]) for name, total in of_task.items()}
        return {**sums, **{name: sum_and_count(of_each) for name, of_each in values.items()}}

    starts = range(0, len(examples), batch)
    if parameter.device.type == "cpu":
        with thread_pool(parameter.device, threads=1) as pool:
            sums = list(pool.map(test, starts))
    else:  # in this thread, whose convolution plans cuDNN remembers
        sums = list(map(test, starts))
    parts = [torch.cat([of_name.flatten() for of_name in part.values()]) for part in sums]
    totals = torch.split(sum(parts[1:], parts[0]).cpu(), [of_name.numel() for of_name in sums[0].values()])
    found: dict[str, Any] = {}
    for (name, like), total in zip(sums[0].items(), totals, strict=True):
        values, counts = total.view(2, -1).tolist()
        if not all(map(math.isfinite, values)):
            raise RunFailed(
                f"the {name} of the model in a test is {sum(values)}: a lower --lr may help, if its eval mode is right"
            )
        means = [value / count if count else None for value, count in zip(values, counts, strict=True)]
        found[name] = means if like.ndim == 2 else means[0]
    return found


def sum_and_count(values: Tensor) -> Tensor:
    """(2,) or (2, C) float64: the sum over (B,) or (B, C) `values` and their number; in a row of C, NaN is none."""
    values = values.double()
    if values.ndim == 1:
        return torch.stack([values.sum(), torch.full_like(values.sum(), len(values))])
    return torch.stack([values.nansum(0), (~values.isnan()).sum(0).double()])


def in_columns(values: Tensor, columns: Tensor, count: int) -> Tensor:
    """(B, `count`) float64: each of (B,) `values` in its column, and NaN in the others."""
    apart = torch.full((len(values), count), math.nan, dtype=torch.float64, device=values.device)
    return apart.scatter_(1, columns.to(values.device)[:, None], values.double()[:, None])
