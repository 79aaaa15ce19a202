"""BatchNorm's running statistics: their names in a model, and the layers that say what becomes of them at a sync.

By default they are averaged as other buffers are (`Statistics`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from strategies.arguments import at_least, at_most
from strategies.domain import ANY, LIMIT, NOT_NEGATIVE, Domain
from strategies.mean import weighted_mean
from strategies.method import Method, ServerRound, State, Tensors, WorkerRound, Zeros

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


@dataclass(frozen=True)
class Statistics(Method):
    """The mean of all workers' statistics, and the largest counter."""

    statistics: ClassVar[Mapping[str, Domain]] = {
        "running_mean": ANY,
        "running_var": NOT_NEGATIVE,
        "num_batches_tracked": NOT_NEGATIVE,
    }
    one_model = False


@dataclass(frozen=True)
class FirstWorker(Statistics):
    """Those of the first worker (as in PyTorch's DistributedDataParallel, whose process 0 broadcasts its buffers)."""

    needs = ("exact-mean",)  # it trusts every worker

    def update(self, r: ServerRound, state: State, mean: Tensors) -> State:
        first = next(iter(r.updates.values())).buffers
        r.buffers = {**r.buffers, **{name: first[name] for name in r.batchnorm}}
        return state


@dataclass(frozen=True)
class Local(FirstWorker):
    """Each worker keeps its own (FedBN: Li et al. 2021, for the statistics); the global ones are the first worker's."""

    def keeps(self, zero: Zeros) -> Tensors:
        return {name: zero.buffers[name] for name in zero.batchnorm}

    def begin(self, r: WorkerRound, own: Tensors, received: Tensors) -> None:
        r.buffers = {**r.buffers, **own}

    def end(self, r: WorkerRound, own: Tensors, received: Tensors) -> tuple[Tensors, Tensors]:
        return {}, {name: r.buffers[name] for name in r.batchnorm()}


@dataclass(frozen=True)
class Pooled(Statistics):
    """The mean, and as variance that of all workers' values together."""

    needs = ("exact-mean",)
    statistics: ClassVar[Mapping[str, Domain]] = {  # the squared difference of two means is part of a variance
        "running_mean": Domain(-math.sqrt(LIMIT / 8), math.sqrt(LIMIT / 8)),
        "running_var": Domain(0, LIMIT / 2),
        "num_batches_tracked": NOT_NEGATIVE,
    }

    def update(self, r: ServerRound, state: State, mean: Tensors) -> State:
        of_workers = [update.buffers for update in r.updates.values()]
        for name in (name for name, entry in r.batchnorm.items() if entry == "running_var"):
            means = [buffers[name.removesuffix("var") + "mean"] for buffers in of_workers]
            variances = [buffers[name] for buffers in of_workers]
            r.buffers = {**r.buffers, name: pooled_variance(means, variances, r.weights)}
        return state


@dataclass(frozen=True)
class ReEstimated(Statistics):
    """The mean; before a test they are estimated again, on so many training `images`, drawn by the seed."""

    images: Annotated[int, at_least(2), at_most(10**9)] = 12_800

    @property
    def reestimates_on(self) -> int:
        return self.images


BATCHNORM: dict[str, type[Statistics]] = {
    "average": Statistics,
    "first-worker": FirstWorker,
    "pooled": Pooled,
    "local": Local,
    "re-estimated": ReEstimated,
}


def pooled_variance(means: Sequence[Tensor], variances: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The variance of a mixture of distributions (law of total variance), computed in float64.

    v = sum w_k (v_k + (mu_k - mu)^2) with mu = sum w_k mu_k; `weights` sum to one.
    """
    mean = weighted_mean([each.double() for each in means], weights)
    parts = [v.double() + (each.double() - mean).square() for each, v in zip(means, variances, strict=True)]
    return weighted_mean(parts, weights).to(variances[0].dtype)
