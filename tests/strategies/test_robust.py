from __future__ import annotations

import pytest
import torch
from torch import Tensor

from strategies.robust import clipped, median, trimmed_mean


def honest(count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, generator=generator) for _ in range(count)]


def test_of_equal_or_untrimmed_updates_it_is_the_mean() -> None:
    same = [honest()[0]] * 5
    for combined in (trimmed_mean(same, 0.2), median(same)):
        assert torch.equal(combined, same[0])
    torch.testing.assert_close(trimmed_mean(honest(), 0.0), torch.stack(honest()).double().mean(0).float())


def test_by_hand() -> None:
    values = [torch.tensor([float(v)]) for v in (5, 1, 100, 3, 2)]
    assert trimmed_mean(values, 0.2).item() == pytest.approx(10 / 3)
    assert median(values).item() == 3
    assert median(values[:4]).item() == 4


@pytest.mark.parametrize("absurd", [1e30, -1e30])
def test_one_absurd_update_leaves_the_rest_their_range(absurd: float) -> None:
    parts = [*honest(), torch.full((3, 4), absurd)]
    low, high = torch.stack(honest()).amin(0), torch.stack(honest()).amax(0)
    for combined in (trimmed_mean(parts, 0.2), median(parts)):
        assert bool(((combined >= low) & (combined <= high)).all())
    assert float(torch.stack(parts).mean(0).abs().max()) > 1e28  # the exact mean follows it


def test_clipping_leaves_small_updates_alone_and_cuts_the_large_one() -> None:
    x = {"a": torch.zeros(2), "b": torch.zeros(2)}
    updates = [{"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([0.0, 4.0 * scale])} for scale in (1, 1, 1e9)]
    first, _, last = clipped(x, updates)
    assert all(torch.equal(first[name], updates[0][name]) for name in x)
    norm = torch.cat([last["a"], last["b"]]).norm()
    assert float(norm) == pytest.approx(5.0)


def test_too_much_trimming_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trim = 0.5 leaves none of 4 workers"):
        trimmed_mean(honest(4), 0.5)
