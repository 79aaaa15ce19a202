"""BatchNorm's running statistics, found by module type, and what becomes of them at a sync."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from strategies.mean import weighted_mean


def batchnorm_buffers(model: nn.Module) -> dict[str, str]:
    """The buffers of the BatchNorm layers of `model`: name in its state_dict -> entry, for instance running_var."""
    return {
        name: name.rpartition(".")[2]
        for prefix, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for name, _ in module.named_buffers(prefix, recurse=False)
    }


def merge(
    average: Mapping[str, Tensor],
    workers: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    how: str,
    batchnorm: Mapping[str, str],
) -> dict[str, Tensor]:
    """The global buffers after a round: the `average` of the `workers`, but for those named in `batchnorm`.

    These are the first worker's with `how` = first-worker or local (where every worker keeps its own besides). Pooled
    variances are those of all workers' values together. Re-estimated statistics are averaged until they are
    re-estimated, which needs images.
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
    """The variance of a mixture of distributions (law of total variance), in float64 and then their own precision.

    v = sum w_k (v_k + (mu_k - mu)^2) with mu = sum w_k mu_k; `weights` sum to one.
    """
    mean = weighted_mean([each.double() for each in means], weights)
    parts = [v.double() + (each.double() - mean).square() for each, v in zip(means, variances, strict=True)]
    return weighted_mean(parts, weights).to(variances[0].dtype)
