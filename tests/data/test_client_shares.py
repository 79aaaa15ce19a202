from __future__ import annotations

import numpy as np
import pytest

from fedsim.config import Config
from fedsim.data.client_shares import client_share, client_shares, in_proportion
from fedsim.data.datasets import load_dataset
from fedsim.data.partition import class_counts
from fedsim.device import resolve
from tests.conftest import NEEDS_FLWR_DATASETS, TEXT


@pytest.mark.parametrize(
    ("total", "to", "sizes"),
    [
        (10, [1, 1, 2], [[2, 3, 5], [3, 2, 5]]),  # 2.5, 2.5, 5: the seed says which half is rounded up
        (7, [5, 0, 1], [[6, 0, 1]]),  # 5.83, 0, 1.17
        (1, [3, 4, 2], [[0, 1, 0]]),
        (0, [3, 4], [[0, 0]]),
    ],
)
def test_largest_remainders_by_hand(total: int, to: list[int], sizes: list[list[int]]) -> None:
    found = {tuple(in_proportion(total, np.array(to), np.random.default_rng(seed)).tolist()) for seed in range(20)}
    assert found == set(map(tuple, sizes))


@pytest.mark.parametrize(
    "keys",
    [
        {"clients": 7},
        pytest.param({"partition": "dirichlet:alpha=0.3", "batch-size": 2}, marks=NEEDS_FLWR_DATASETS),
        {"validation": 50},
        pytest.param({**TEXT, "partition": "dirichlet:alpha=0.5"}, marks=NEEDS_FLWR_DATASETS),
        {"dataset": "tests.tasks.test_own_loss:regression", "model": "tests.tasks.test_own_loss:linear"},
    ],
)
def test_each_client_has_of_each_group_the_part_that_it_trains_on(small: Config, keys: dict[str, object]) -> None:
    config = resolve(small.changed(keys), "localsgd")
    test, (owners, clients) = load_dataset(config).test, client_shares(config)
    counts, groups = class_counts(config), test.groups.cpu().numpy()
    assert (len(owners), clients) == (len(test), config.clients)
    for group, held in enumerate(counts.T):
        shares = np.bincount(owners[groups == group], minlength=clients)
        quotas = len(groups[groups == group]) * (held / held.sum() if held.any() else 1 / clients)
        assert (np.abs(shares - quotas) < 1).all()
    assert sum(len(client_share(config, worker)) for worker in range(clients)) == len(test)
