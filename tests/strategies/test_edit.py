"""EDiT's mean, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from strategies.edit import Edit
from strategies.method import ServerRound, State, Update


def averaged(
    mean: Edit, ends: list[list[float]], state: State, workers: list[int] | None = None
) -> tuple[list[float], State]:
    """The mean of workers with equal weights that began at zero."""
    zero = {"w": torch.zeros(2)}
    updates = {
        k: Update(1, {"w": torch.tensor(end)}, {}, {}, {}) for k, end in zip(workers or range(9), ends, strict=False)
    }
    r = ServerRound(1, True, zero, zero, updates=updates, weights=[1 / len(ends)] * len(ends))
    result, state = mean.of_models(r, zero, state)
    return result["w"].tolist(), state


def test_small_updates_count_more() -> None:
    """Norms 1 and 3: the weights are e^-1 and e^-3 over their sum, at a temperature of 2 roots of these."""
    for temperature in (1.0, 2.0):
        share = 1 / (1 + math.exp(-2 / temperature))
        found, _ = averaged(Edit(temperature=temperature), [[1.0, 0.0], [0.0, 3.0]], {})
        assert found == pytest.approx([share, 3 * (1 - share)])


def test_updates_of_equal_norms_have_their_mean_and_equal_ones_are_it_exactly() -> None:
    assert averaged(Edit(), [[3.0, 4.0], [4.0, 3.0], [0.0, 5.0]], {})[0] == pytest.approx([7 / 3, 4.0])
    assert averaged(Edit(), [[0.1, 0.7]] * 3, {})[0] == torch.tensor([0.1, 0.7]).tolist()


def test_the_mean_is_clipped_by_its_norm() -> None:
    assert averaged(Edit(clip=1.0), [[3.0, 4.0]] * 2, {})[0] == pytest.approx([0.6, 0.8])


def test_the_averages_of_norms_are_the_authors_and_an_update_unlike_them_is_dropped() -> None:
    """The values are those of OnlineDynamicEWMA in intelligent-machine-learning/dlrover a7315308, with alpha = 0.5."""
    mean, state = Edit(alpha=0.5, warmup=4, threshold=3.0, clip=1e9), State()
    expected = [(0.5, 0.125), (1.25, 0.34375), (2.125, 0.5546875), (2.0625, 0.279296875)]
    for count, (norm, of_authors) in enumerate(zip((1.0, 2.0, 3.0, 2.0), expected, strict=True), 1):
        _, state = averaged(mean, [[norm, 0.0], [0.0, norm]], state, [0, 3])
        for worker in (0, 3):
            assert state["w"][worker].tolist() == [*of_authors, count]
    limit = 2.0625 + 3 * math.sqrt(0.279296875)
    before = state["w"].clone()
    found, state = averaged(mean, [[1.01 * limit, 0.0], [0.0, 1.0]], state, [0, 3])
    assert found == [0.0, 1.0]
    assert torch.equal(state["w"][0], before[0])
    assert averaged(mean, [[1.01 * limit, 0.0]], state, [0])[0] == [0.0, 0.0]
    assert averaged(mean, [[0.99 * limit, 0.0]], state, [0])[0] == pytest.approx([0.99 * limit, 0.0])
