"""Tests on each client's share of the test data: of the global model, and of its own after its local steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fedsim.config import Config
from fedsim.data.client_shares import client_share
from fedsim.data.datasets import task_of
from fedsim.data.metric import Metric
from fedsim.errors import RunFailed
from fedsim.models import initial_model
from fedsim.runs.columns import OF_CLIENTS, OF_OWN_MODELS
from fedsim.training.step import evaluate


def own_test(config: Config, worker: int, weights: Mapping[str, Tensor]) -> float:
    """The metric of a client's own model on its share of the test data; NaN without examples, or where it diverged."""
    share = client_share(config, worker)
    if not len(share):
        return math.nan
    task, model = task_of(config), initial_model(config)
    model.load_state_dict(weights)
    try:
        value: float = evaluate(task, model, share, config.precision)[task.metric.name]
    except RunFailed:
        return math.nan  # the server says so of its update
    return value


def own_tests(clients: int, reported: Mapping[int, Any]) -> list[float | None]:
    """What each of all `clients` has `reported`; None where that is no finite number."""
    values = [reported.get(worker) for worker in range(clients)]
    return [value if isinstance(value, float) and math.isfinite(value) else None for value in values]


def spreads(metric: Metric, row: Mapping[str, Any]) -> dict[str, float | None]:
    """Columns for the lists that a `row` has of all clients, and how much better their own models are on average."""
    found: dict[str, float | None] = {}
    for name in (OF_CLIENTS, OF_OWN_MODELS):
        found |= spread(metric, name, row[name]) if name in row else {}
    both = zip(row.get(OF_CLIENTS, ()), row.get(OF_OWN_MODELS, ()), strict=False)
    gaps = [own - of_global for of_global, own in both if of_global is not None and own is not None]
    sign = 1 if metric.higher_is_better else -1
    return {**found, **({f"{OF_OWN_MODELS}_gain": sign * float(np.mean(gaps))} if gaps else {})}


def spread(metric: Metric, name: str, of_clients: Sequence[float | None]) -> dict[str, float | None]:
    """What papers report of a metric `of_clients`, by the names that begin with `name`; None without values.

    The mean over clients, each counted once, their standard deviation, the worst client, and the mean of the worst
    tenth of them, rounded up (as Li et al. 2020, q-FedAvg).
    """
    known = sorted((value for value in of_clients if value is not None), reverse=not metric.higher_is_better)
    columns = [f"{name}_{what}" for what in ("mean", "std", "worst", "worst_tenth")]
    if not known:
        return dict.fromkeys(columns)
    tenth = known[: -(-len(known) // 10)]
    values = [float(np.mean(known)), float(np.std(known)), known[0], float(np.mean(tenth))]
    return dict(zip(columns, values, strict=True))
