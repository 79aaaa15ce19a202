from __future__ import annotations

from fractions import Fraction
from typing import Literal

import pytest

from fedsim.config import Config
from fedsim.optim.lr_schedule import schedule_of


def test_the_papers_lars_at_1024_takes_the_rates_that_its_code_printed() -> None:
    config = Config(
        lr=0.01,
        lr_scaling="linear:batch=128",
        schedule="cosine",
        batch_size=1024,
        schedule_unit="epoch",
        warmup_epochs=5.0,
    )
    lr = schedule_of(config, Fraction(49), 100)
    printed = {1: 0.016, 2: 0.032, 5: 0.08, 6: 0.08, 7: 0.079978, 8: 0.079913, 20: 0.075789, 25: 0.072361}
    for epoch, rate in printed.items():
        first, last = lr((epoch - 1) * 49), lr(epoch * 49 - 1)
        assert first == last
        assert round(first, 6) == rate


def test_multistep_by_epochs_in_either_unit() -> None:
    config = Config(lr=1.0, schedule="multistep:milestones=2/3,gamma=0.1")
    for unit in ("step", "epoch"):
        lr = schedule_of(config.changed({"schedule-unit": unit}), Fraction(4), 5)
        assert [lr(step) for step in (0, 7, 8, 11, 12, 19)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_warm_up_and_cosine_by_steps() -> None:
    lr = schedule_of(Config(lr=8.0, schedule="cosine", warmup_epochs=2.0), Fraction(2), 6)
    assert [lr(step) for step in range(4)] == [2.0, 4.0, 6.0, 8.0]
    assert lr(4) == 8.0
    assert lr(8) == pytest.approx(4.0)  # half way through the cosine
    assert 0 < lr(11) < 0.5
    assert [lr(step) for step in range(4, 12)] == sorted((lr(step) for step in range(4, 12)), reverse=True)


def test_a_fractional_epoch_of_steps_is_counted_exactly() -> None:
    lr = schedule_of(Config(lr=1.0, schedule="multistep:milestones=3"), Fraction(50_000, 12 * 64), 10)
    first_decayed = next(step for step in range(1000) if lr(step) < 1)
    assert first_decayed == -(-3 * 50_000 // (12 * 64))


def test_constant_without_warm_up_is_constant() -> None:
    lr = schedule_of(Config(lr=0.3), Fraction(7), 3)
    assert {lr(step) for step in range(30)} == {0.3}


@pytest.mark.parametrize(("scaling", "workers", "peak"), [("linear", 1, 0.2), ("linear", 4, 0.8), ("sqrt", 8, 0.4)])
def test_the_rate_follows_the_batch_of_all_workers(
    scaling: Literal["linear", "sqrt"], workers: int, peak: float
) -> None:
    config = Config(lr=0.1, lr_scaling=f"{scaling}:batch=32", batch_size=64)
    assert schedule_of(config, Fraction(7), 3, workers)(0) == pytest.approx(peak)
    assert schedule_of(config.changed({"lr-scaling": "none"}), Fraction(7), 3, workers)(0) == 0.1
