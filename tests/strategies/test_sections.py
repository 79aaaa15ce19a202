"""Parameters, buffers and extras, told apart by the model itself, and how buffers are merged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from strategies.batchnorm import batchnorm_buffers
from strategies.sections import buffers_of, join, sections, split
from tests.conftest import assert_same_bits
from tests.strategies.test_batchnorm import merged


class Meter(nn.Module):
    """No BatchNorm, but buffers that are called as its are."""

    def __init__(self) -> None:
        super().__init__()
        self.running_var = nn.Parameter(torch.ones(2))
        self.register_buffer("running_mean", torch.zeros(2))


MODEL = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), Meter())


def test_the_model_tells_parameters_from_buffers() -> None:
    extras = {"optimizer/0.weight/momentum_buffer": torch.ones(2, 2)}
    arrays = join(sections(MODEL.state_dict(), buffers_of(MODEL), extras))
    found = split(arrays)
    assert set(found.parameters) == {"0.weight", "0.bias", "1.weight", "1.bias", "2.running_var"}
    assert set(found.buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked", "2.running_mean"}
    assert_same_bits({**found.parameters, **found.buffers}, MODEL.state_dict())
    assert_same_bits(found.extras, extras)


def test_batchnorm_is_known_by_its_type_not_by_names() -> None:
    assert batchnorm_buffers(MODEL) == {
        "1.running_mean": "running_mean",
        "1.running_var": "running_var",
        "1.num_batches_tracked": "num_batches_tracked",
    }
    own = nn.BatchNorm2d(3)
    own.register_buffer("seen", torch.zeros(3))  # no statistic of BatchNorm's
    assert batchnorm_buffers(own).keys() == {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize(("how", "mean"), [("average", 3.0), ("first-worker", 1.0)])
def test_only_batchnorms_buffers_are_merged_as_asked(how: str, mean: float) -> None:
    def buffers(value: float, count: int) -> dict[str, Tensor]:
        means = {name: torch.full((2,), value) for name in ("1.running_mean", "2.running_mean")}
        return {**means, "1.num_batches_tracked": torch.tensor(count)}

    workers = [buffers(1.0, 7), buffers(5.0, 9)]
    batchnorm = {name: entry for name, entry in batchnorm_buffers(MODEL).items() if name in workers[0]}
    after = merged(how, workers, [0.5, 0.5], batchnorm)
    assert after["1.running_mean"].tolist() == [mean, mean]
    assert after["2.running_mean"].tolist() == [3.0, 3.0]
    count = after["1.num_batches_tracked"]
    assert (count.dtype, int(count)) == (torch.int64, 9 if how == "average" else 7)
