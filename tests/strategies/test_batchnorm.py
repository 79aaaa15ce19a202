"""BatchNorm's statistics at a sync, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from strategies.batchnorm import BATCHNORM, pooled_variance
from strategies.mean import mean
from strategies.method import ServerRound, Update
from tests.conftest import assert_same_bits

NAMES = {"running_mean": "running_mean", "running_var": "running_var", "num_batches_tracked": "num_batches_tracked"}


def buffers(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "running_mean": torch.randn(1000, generator=generator, dtype=dtype),
        "running_var": torch.rand(1000, generator=generator, dtype=dtype),
        "num_batches_tracked": torch.tensor(5 + seed),
    }


def merged(
    how: str, workers: list[dict[str, Tensor]], weights: list[float], names: dict[str, str] = NAMES
) -> dict[str, Tensor]:
    """The global buffers after a round of workers with such buffers."""
    updates = {worker: Update(1, {}, each, {}, {}) for worker, each in enumerate(workers)}
    r = ServerRound(1, True, {}, {}, batchnorm=names, updates=updates, weights=weights, buffers=mean(workers, weights))
    BATCHNORM[how]().update(r, {}, {})
    return r.buffers


def test_the_pooled_variance_by_hand() -> None:
    """Means 1 and 3 of weights 3/4 and 1/4: mu = 1.5, v = 3/4 (2 + 0.25) + 1/4 (4 + 2.25)."""
    workers = [
        {"running_mean": torch.tensor([mean]), "running_var": torch.tensor([variance])}
        for mean, variance in ((1.0, 2.0), (3.0, 4.0))
    ]
    pooled = merged("pooled", workers, [0.75, 0.25], {name: name for name in workers[0]})
    assert pooled == {"running_mean": 1.5, "running_var": 3.25}


def test_the_pooled_variance_is_that_of_all_values_together() -> None:
    values = [torch.randn(count, 3, dtype=torch.float64) * count + count for count in (20, 30, 50)]
    means, variances = [each.mean(0) for each in values], [each.var(0, correction=0) for each in values]
    pooled = pooled_variance(means, variances, [0.2, 0.3, 0.5])
    torch.testing.assert_close(pooled, torch.cat(values).var(0, correction=0), rtol=1e-14, atol=0)


@pytest.mark.parametrize("workers", [1, 3, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_identical_workers_every_rule_gives_theirs_bitwise(workers: int, dtype: torch.dtype) -> None:
    for how in ("average", "first-worker", "pooled", "local", "re-estimated"):
        assert_same_bits(merged(how, [buffers(0, dtype)] * workers, [1 / workers] * workers), buffers(0, dtype))


def test_only_the_variance_is_pooled() -> None:
    workers, weights = [buffers(0), buffers(1)], [0.5, 0.5]
    average, pooled = merged("average", workers, weights), merged("pooled", workers, weights)
    assert (pooled["running_var"] > average["running_var"]).all()
    assert pooled["running_var"].dtype == torch.float32
    for name in ("running_mean", "num_batches_tracked"):
        assert torch.equal(pooled[name], average[name])
    assert int(pooled["num_batches_tracked"]) == 6
