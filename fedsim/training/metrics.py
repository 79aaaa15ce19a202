"""What a model is tested by besides the metrics of its task: by name, or functions of the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.data.datasets import task_of
from fedsim.data.metric import metric_name
from fedsim.data.task import with_floats
from fedsim.device import one_thread
from fedsim.errors import UserError
from fedsim.models import cpu_model
from fedsim.registry import failures_of
from fedsim.training.step import in_columns

# Outputs and targets of B examples -> (B,) or (B, C) values, of which the means are taken (see `evaluate`)
MetricFn = Callable[[Any, Tensor], Tensor]


def top5_accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Whether the class is among the five with the largest logits."""
    return (outputs.topk(min(5, outputs.shape[1]), dim=1).indices == targets[:, None]).any(1)


def per_class_accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The accuracy of each class: of each example, in the column of its class, whether it is right."""
    return in_columns(outputs.argmax(1) == targets, targets, outputs.shape[1])


def metrics_by_name(config: Config) -> dict[str, MetricFn]:
    """The key `metrics`: each function by its name in the columns of rows."""
    choices = config.choices("metrics")
    return {metric_name(choice.name): choice.make for choice in choices}


@one_thread()
def check_metrics(config: Config) -> None:
    """Raise UserError where a metric fails on two made-up examples, or gives no finite number for each of them.

    For tests on shares of clients, that of the task must give one.
    """
    every = config.evaluate_clients_every
    if config.metrics == "none" and not every:
        return
    if every % config.evaluate_every:
        raise UserError(
            f"evaluate-clients-every = {every} is no multiple of evaluate-every = {config.evaluate_every}: give one"
        )
    model, task = cpu_model(config).eval(), task_of(config)
    batch = with_floats(task.trial(config, 2), torch.float32)
    with torch.inference_mode():
        outputs = task.forward(model, batch)
        known = task.sums(outputs, batch[1])
        for name, metric in metrics_by_name(config).items():
            what = f"metrics = {config.metrics}: {name}"
            if name in known:
                raise UserError(f"{what} is tested already: give the function another name")
            with failures_of(f"{what} fails on {task.taken(config)}"):
                values = metric(outputs, batch[1])
            if not _is_of_each(values):
                raise UserError(
                    f"{what} gives {values} for two examples: it must give a tensor of a number for each, or of C"
                )
        if every:
            what = f"evaluate-clients-every = {every}: {task.metric.words} of the model is not that of each example"
            with failures_of(what, remedy="leave it out"):
                task.values(outputs, batch[1])


def _is_of_each(values: Any) -> bool:
    """Whether `values` are numbers of two examples or, with gaps, rows of them."""
    if not isinstance(values, Tensor) or values.ndim not in (1, 2) or len(values) != 2:
        return False
    return math.isfinite(float(values.double().sum() if values.ndim == 1 else values.double().nansum()))
