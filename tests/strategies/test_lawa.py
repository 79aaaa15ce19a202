"""The mean of the last models, by hand."""

from __future__ import annotations

import pytest
import torch

from strategies.lawa import Lawa
from strategies.method import ServerRound, State


@pytest.mark.parametrize(
    ("lawa", "expected"),
    [
        (Lawa(models=1), [1, 2, 4, 8, 16, 32, 64]),
        (Lawa(models=3), [1, 1.5, 7 / 3, 14 / 3, 28 / 3, 56 / 3, 112 / 3]),
        (Lawa(models=2, every=2), [1, 2, 2, 5, 5, 20, 20]),  # of rounds 2, 4, 6: 2, 8, 32
    ],
)
def test_it_is_the_mean_of_the_last_models(lawa: Lawa, expected: list[float]) -> None:
    state, found = State(), []
    for round_ in range(1, 8):
        x = {"w": torch.tensor([2.0 ** (round_ - 1)])}
        state = lawa.update(ServerRound(round_, True, {}, {}, next_x=x), state, {})
        found.append(float(lawa.model_for_test(x, state)["w"]))
    assert found == pytest.approx(expected)
