from __future__ import annotations

import math

import pandas as pd
import pytest

from fedsim.errors import UserError
from fedsim.report.stragglers import Stragglers, computed_steps, slowest, stragglers

LOGNORMAL, EXPONENTIAL = Stragglers("lognormal", 0.3), Stragglers("exponential")


@pytest.mark.parametrize("which", [Stragglers(), LOGNORMAL, EXPONENTIAL])
@pytest.mark.parametrize("steps", [1, 7, 5000])
def test_one_worker_waits_for_nobody(which: Stragglers, steps: int) -> None:
    assert slowest(steps, 1, 1, which) == pytest.approx(steps, rel=1e-12)
    assert slowest(steps, 1, 1, which._replace(slow=1, factor=2.5)) == pytest.approx(2.5 * steps, rel=1e-12)


def test_one_slow_worker_without_jitter_is_waited_for() -> None:
    slow = Stragglers(slow=1, factor=2.5)
    assert slowest(10, 4, 4, slow) == 25
    # If two of eight clients are sampled, in every fourth round
    assert slowest(10, 2, 8, slow) == pytest.approx(10 * (1 + 1.5 / 4))
    assert slowest(10, 2, 8, slow._replace(slow=7)) == 25
    assert slowest(10, 2, 8, slow._replace(slow=9)) == 25
    assert slowest(10, 2, 8, slow._replace(jitter="lognormal", sigma=0.01)) == pytest.approx(13.75, rel=2e-3)
    # With a little jitter still for the same one
    assert slowest(100, 4, 4, slow._replace(jitter="lognormal", sigma=0.1)) == pytest.approx(250, rel=1e-9)


def test_the_mean_maximum_of_exponentials_is_a_harmonic_number() -> None:
    for workers in (2, 8, 100):
        expected = sum(1 / k for k in range(1, workers + 1))
        assert slowest(1, workers, workers, EXPONENTIAL) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("steps", [2, 50, 5000])
def test_the_mean_maximum_of_two_sums_of_exponentials(steps: int) -> None:
    expected = steps * (1 + math.comb(2 * steps, steps) / 4**steps)
    waited = slowest(steps, 2, 2, EXPONENTIAL) - steps
    assert waited == pytest.approx(expected - steps, rel=1e-3)


@pytest.mark.parametrize("steps", [900, 5000])
def test_two_workers_with_many_steps_are_two_normal_variables(steps: int) -> None:
    waited = slowest(steps, 2, 2, LOGNORMAL) - steps
    assert waited == pytest.approx(math.sqrt(steps * math.expm1(0.3**2) / math.pi), rel=1e-3)


def test_a_slow_worker_with_jitter_is_the_mean_over_which_workers_are_sampled() -> None:
    """Of 2 workers from 4 clients, 1 slow: in every second round a usual and a slow exponential, else two usual."""
    rates = (1, 1 / 2.5)  # the mean maximum of two exponentials: 1 / a + 1 / b - 1 / (a + b)
    mixed = sum(1 / rate for rate in rates) - 1 / sum(rates)
    found = slowest(1, 2, 4, EXPONENTIAL._replace(slow=1, factor=2.5))
    assert found == pytest.approx((mixed + 1.5) / 2, rel=1e-6)


def rows_of(*records: tuple[int, int, int]) -> pd.DataFrame:
    """Rows from (run, local steps, syncs) so far, with four workers."""
    rows = pd.DataFrame(records, columns=["run", "steps_done", "network_syncs"]).astype(float)
    return rows.assign(clients=4, workers=4)


def test_each_round_of_a_varying_j_waits_by_itself() -> None:
    one, two, eight = (slowest(steps, 4, 4, EXPONENTIAL) for steps in (1, 2, 8))
    found = computed_steps(rows_of((0, 1, 1), (0, 2, 2), (0, 4, 3), (0, 12, 4), (1, 8, 1)), EXPONENTIAL)
    assert list(found) == pytest.approx([one, 2 * one, 2 * one + two, 2 * one + two + eight, eight])
    # Rows of several rounds: four of one step; then two of one and one of two; unknown syncs are left out
    found = computed_steps(rows_of((0, 4, 4), (0, 8, 7)), EXPONENTIAL)
    assert list(found) == pytest.approx([4 * one, 6 * one + two])
    assert computed_steps(rows_of((0, 4, 4)).assign(network_syncs=math.nan), EXPONENTIAL).empty


def test_without_stragglers_the_steps_are_those_recorded() -> None:
    rows = rows_of((0, 7, 2), (0, 20, 5), (1, 3, 3))
    assert list(computed_steps(rows, Stragglers())) == [7, 20, 3]


def test_options_are_read() -> None:
    assert stragglers("", "") == Stragglers()
    assert stragglers("lognormal:0.3", "1:2.5") == Stragglers("lognormal", 0.3, 1, 2.5)
    assert stragglers("exponential", "2:3") == Stragglers("exponential", 0.0, 2, 3.0)


@pytest.mark.parametrize(
    ("jitter", "slow", "said"),
    [
        *((text, "", "jitter = .* for instance lognormal:0.3") for text in (
            "normal:0.3", "lognormal", "lognormal:", "lognormal:0", "lognormal:2", "lognormal:-1", "lognormal:nan",
            "lognormal:1e-1", "lognormal:0.3:1", "exponential:1", "exponential:", ":", ":0.3", "lognormal:.")),
        *(("", text, "slow = .* for instance 1:2.5") for text in (
            "1", "1:", ":2", "0:2", "1:1", "1:0.5", "-1:2", "1:nan", "1:2:3", "1.5:2", "1:1e3", "٣:2", "1:9999999")),
    ],
)  # fmt: skip
def test_bad_options_are_refused_in_one_line(jitter: str, slow: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        stragglers(jitter, slow)
