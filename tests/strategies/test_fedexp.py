"""FedExP's step, by hand."""

from __future__ import annotations

import pytest
import torch

from strategies.fedexp import FedExP
from strategies.method import ServerRound, Update


def stepped(ends: list[list[float]], encoded: bool = False) -> list[float]:
    """The next x of a round that began at zero, of workers with equal weights."""
    zero = {"w": torch.zeros(2)}
    y = torch.tensor(ends)
    sent = -y if encoded else y
    updates = {worker: Update(1, {"w": each}, {}, {}, {}) for worker, each in enumerate(sent)}
    weights = [1 / len(ends)] * len(ends)
    r = ServerRound(1, True, zero, zero, updates=updates, encoded=encoded, weights=weights, next_x={"w": y.mean(0)})
    FedExP(eps=0.0).update(r, {}, {})
    return r.next_x["w"].tolist()


@pytest.mark.parametrize("encoded", [False, True])
def test_workers_that_disagree_make_a_longer_step(encoded: bool) -> None:
    """Squared norms 9 and 16, their mean 12.5, that of the mean (1.5, 2) 6.25: the factor is 12.5 / 12.5, so 1."""
    assert stepped([[3.0, 0.0], [0.0, 4.0]], encoded) == [1.5, 2.0]
    assert stepped([[4.0, 3.0], [-4.0, 3.0]], encoded) == pytest.approx([0.0, 3 * 25 / 18])


def test_workers_that_agree_make_the_mean_and_none_that_moved_nothing() -> None:
    assert stepped([[1.0, 2.0]] * 3) == [1.0, 2.0]
    assert stepped([[0.0, 0.0]] * 2) == [0.0, 0.0]
