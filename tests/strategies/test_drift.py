"""How far and how alike workers move, by hand, and in the rows of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from strategies.drift import drift
from strategies.method import ServerRound, Update
from tests.conftest import Execute, rows_of

X = {"w": torch.zeros(2, 1), "b": torch.zeros(1)}


def moved(to: Sequence[Sequence[float]], weights: Sequence[float], encoded: bool = False) -> ServerRound:
    """A round from zero, whose workers end at these points (with `encoded`, send these differences)."""
    parts = [{"w": torch.tensor(point[:2])[:, None], "b": torch.tensor(point[2:])} for point in to]
    updates = {worker: Update(1.0, part, {}, {}, {}) for worker, part in enumerate(parts)}
    return ServerRound(1, True, X, X, updates=updates, weights=weights, encoded=encoded)


def test_three_workers_by_hand() -> None:
    """Of norms 5, 5 and 2; the cosines are 0, 0.6 and 0.8; and one that has not moved counts in norm and spread."""
    points = [[3.0, 4.0, 0.0], [-4.0, 3.0, 0.0], [0.0, 2.0, 0.0]]
    found = drift(moved(points, [0.25, 0.25, 0.5]))
    assert found["update-norm"] == pytest.approx(math.hypot(-0.25, 2.75))
    assert found["update-cosine"] == pytest.approx((0 + 0.8 + 0.6) / 3)
    assert found["update-spread"] == pytest.approx(math.sqrt(2) / 4)
    still = drift(moved([*points, [0.0, 0.0, 0.0]], [0.25] * 4, encoded=True))
    assert still["update-cosine"] == pytest.approx((0 + 0.8 + 0.6) / 3)
    assert still["update-spread"] == pytest.approx(math.sqrt(4.5) / 3)


def test_where_it_has_no_value_it_is_left_out() -> None:
    assert drift(moved([[3.0, 0.0, 4.0]], [1.0])) == {"update-norm": 5.0, "update-spread": 0.0}
    assert drift(moved([[0.0] * 3] * 2, [0.5, 0.5])) == {"update-norm": 0.0}
    same = drift(moved([[0.0, 0.0, 2.0]] * 4, [0.25] * 4))
    assert same == {"update-norm": 2.0, "update-cosine": 1.0, "update-spread": 0.0}


def test_a_row_has_it_where_the_model_is_tested(run: Execute) -> None:
    """Of compressed updates too. Alone, a worker has no other to agree with."""
    for name, keys in {"plain": {}, "coded": {"compress": "topk:ratio=0.5"}}.items():
        untested, tested = rows_of(run(name=name, rounds=2, evaluate_every=2, **keys))
        assert [untested[f"update_{each}"] for each in ("norm", "cosine", "spread")] == [None] * 3
        assert tested["update_norm"] > 0
        assert -1 / 3 <= tested["update_cosine"] <= 1
        assert tested["update_spread"] > 0
    (alone,) = rows_of(run(name="alone", rounds=1, clients=1))
    assert (alone["update_cosine"], alone["update_spread"]) == (None, 0.0)
