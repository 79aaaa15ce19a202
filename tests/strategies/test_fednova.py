"""What a worker's gradients count in FedNova, by hand."""

from __future__ import annotations

import pytest
import torch

from strategies.fednova import FedNova, normalizer
from strategies.method import ServerRound, WorkerRound


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_how_far_gradients_of_one_move_sgdm(momentum: float) -> None:
    rates = [0.1, 0.05, 0.2, 0.1]
    y = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([y], momentum=momentum)
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        y.grad = -torch.ones_like(y)
        optimizer.step()
    assert normalizer(rates, momentum) == pytest.approx(y.item(), rel=1e-14)


def test_two_workers_by_hand() -> None:
    """From x = 0, one step to 1 and three to 6, at a rate of 0.5: (0.5 + 1.5) / 2 times (1 / 0.5 + 6 / 1.5) / 2 = 3."""
    x = {"w": torch.zeros(1)}
    sent, replies = [], []
    for worker, (steps, end) in enumerate([(1, 1.0), (3, 6.0)]):
        r = WorkerRound(worker, 1, steps, lambda _: [0.5] * 3, True, 0.0, x, x, {})
        r.y = {"w": torch.tensor([end])}
        replies.append(FedNova().end(r, {}, {})[0]["a"])
        sent.append(r.y["w"])
    server = ServerRound(1, True, x, x, next_x={"w": torch.stack(sent).mean(0)})
    FedNova().update(server, {}, {"a": torch.stack(replies).mean()})
    assert server.next_x["w"].item() == 3.0


def test_at_a_rate_of_zero_nothing_moves() -> None:
    x = {"w": torch.ones(1)}
    r = WorkerRound(0, 1, 2, lambda _: [0.0] * 2, True, 0.0, x, x, {}, y=x)
    assert FedNova().end(r, {}, {})[0]["a"] == 0
    assert r.y == x
