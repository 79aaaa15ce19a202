"""FedExP's step, by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from strategies.fedexp import FedExP
from strategies.method import ServerRound, Update


def stepped(ends: list[list[float]], encoded: bool = False, weights: Sequence[float] = ()) -> list[float]:
    """The next x of a round that began at zero; where no weights are given they are equal."""
    zero = {"w": torch.zeros(2)}
    y = torch.tensor(ends)
    sent = -y if encoded else y
    updates = {worker: Update(1, {"w": each}, {}, {}, {}) for worker, each in enumerate(sent)}
    weights = weights or [1 / len(ends)] * len(ends)
    mean = {"w": torch.tensor(weights) @ y}
    r = ServerRound(1, True, zero, zero, updates=updates, encoded=encoded, weights=weights, next_x=mean)
    FedExP(eps=0.0).update(r, {}, {})
    return r.next_x["w"].tolist()


@pytest.mark.parametrize("encoded", [False, True])
def test_workers_that_disagree_make_a_longer_step(encoded: bool) -> None:
    """Squared norms 9 and 16, their mean 12.5, that of the mean (1.5, 2) 6.25: the factor is 12.5 / 12.5, so 1."""
    assert stepped([[3.0, 0.0], [0.0, 4.0]], encoded) == [1.5, 2.0]
    assert stepped([[4.0, 3.0], [-4.0, 3.0]], encoded) == pytest.approx([0.0, 3 * 25 / 18])


def test_weights_count_in_both_means() -> None:
    """The mean of the squared norms is 16 / 4 + 3 / 4, the mean 4 / 4 - 3 / 4: the factor is 4.75 / (2 / 16)."""
    assert stepped([[4.0, 0.0], [-1.0, 0.0]], weights=[0.25, 0.75]) == [0.25 * 38, 0.0]


def test_workers_that_agree_make_the_mean_and_none_that_moved_nothing() -> None:
    assert stepped([[1.0, 2.0]] * 3) == [1.0, 2.0]
    assert stepped([[0.0, 0.0]] * 2) == [0.0, 0.0]
