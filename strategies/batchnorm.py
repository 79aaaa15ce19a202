"""BatchNorm's running statistics: their names in a model, and how they are merged at a sync."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from strategies.mean import weighted_mean
from strategies.screening import ANY, LIMIT, NOT_NEGATIVE, Domain

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def batchnorm_buffers(model: nn.Module) -> dict[str, str]:
    """The running statistics of the BatchNorm layers of `model`: name in its state_dict -> entry, as running_var.

    A class of one's own that extends BatchNorm may have other buffers too, which are merged as any other layer's.
    """
    return {
        name: name.rpartition(".")[2]
        for prefix, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for name, _ in module.named_buffers(prefix, recurse=False)
        if name.rpartition(".")[2] in STATISTICS
    }


def batchnorm_domains(batchnorm: Mapping[str, str], how: str) -> dict[str, Domain]:
    """The domains of the buffers named in `batchnorm`, if they are merged as `how` says (see `merge`).

    Pooled, the squared difference of two means is part of a variance.
    """
    of_mean, of_variance = ANY, NOT_NEGATIVE
    if how == "pooled":
        of_mean, of_variance = Domain(-math.sqrt(LIMIT / 8), math.sqrt(LIMIT / 8)), Domain(0, LIMIT / 2)
    of_entry = {"running_mean": of_mean, "running_var": of_variance, "num_batches_tracked": NOT_NEGATIVE}
    return {name: of_entry[entry] for name, entry in batchnorm.items()}


def merge(
    average: Mapping[str, Tensor],
    workers: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    how: str,
    batchnorm: Mapping[str, str],
) -> dict[str, Tensor]:
    """The global buffers after a round: the `average` of the `workers`, except where `how` says otherwise.

    It applies to the buffers named in `batchnorm`. With first-worker or local (where each worker also keeps its own)
    they are the first worker's. With pooled, a variance is that of all workers' values together. With re-estimated they
    are the average here, since the re-estimation needs images.
    """
    merged = dict(average)
    for name in average.keys() & batchnorm.keys():
        if how in ("first-worker", "local"):
            merged[name] = workers[0][name]
        elif how == "pooled" and batchnorm[name] == "running_var":
            means = [worker[name.removesuffix("var") + "mean"] for worker in workers]
            merged[name] = pooled_variance(means, [worker[name] for worker in workers], weights)
    return merged


def pooled_variance(means: Sequence[Tensor], variances: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The variance of a mixture of distributions (law of total variance), computed in float64.

    v = sum w_k (v_k + (mu_k - mu)^2) with mu = sum w_k mu_k; `weights` sum to one.
    """
    mean = weighted_mean([each.double() for each in means], weights)
    parts = [v.double() + (each.double() - mean).square() for each, v in zip(means, variances, strict=True)]
    return weighted_mean(parts, weights).to(variances[0].dtype)
