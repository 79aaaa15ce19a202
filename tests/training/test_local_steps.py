from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest

from fedsim.config import Config
from fedsim.optim.lr_schedule import Schedule, schedule_of
from fedsim.training.local_steps import (
    Doubling,
    LinearSteps,
    LocalSteps,
    LocalStepsSchedule,
    Outline,
    PostLocal,
    Qsr,
    Table,
    local_steps_of,
)
from fedsim.training.round_starts import RoundStarts, rounds_of_number, rounds_of_steps


def rule(schedule: LocalStepsSchedule, least: int, of_epoch: Fraction = Fraction(10), **run: Any) -> LocalSteps:
    """The rule of a run of 100 steps at a constant rate without warm-up, except for what `run` says."""
    usual = Outline(least, of_epoch, 100, lambda step: 0.1, 0, 0.0)
    return schedule.rule(usual._replace(**run))


RULES: dict[str, LocalSteps] = {
    "post-local": rule(PostLocal(2.5), 7),
    "qsr": rule(Qsr(0.05), 4, rate=lambda step: 0.02 * (1 - step / 100), warmup_steps=10),
    "linear": rule(LinearSteps(20), 2),
    "doubling": rule(Doubling(13), 3),
    "table": rule(Table((1.5, 5.0), (1, 16)), 2),
}


def one_by_one(rule: LocalSteps) -> Iterator[int]:
    """The local step at which each round begins, without end."""
    return itertools.accumulate(itertools.repeat(0), lambda start, _: start + rule(start))


def lengths(rule: LocalSteps, total: int = 100) -> list[int]:
    starts = [*itertools.takewhile(lambda start: start < total, one_by_one(rule)), total]
    assert list(RoundStarts(rounds_of_steps(rule, total))) == starts
    return [after - before for before, after in itertools.pairwise(starts)]


@pytest.mark.parametrize("name", RULES)
def test_the_rounds_add_up_to_the_run(name: str) -> None:
    for total in (1, 99, 100, 101):
        assert sum(lengths(RULES[name], total)) == total
        assert min(lengths(RULES[name], total)) >= 1


def test_each_rule_by_hand() -> None:
    assert lengths(RULES["post-local"]) == [1] * 25 + [7] * 10 + [5]
    assert lengths(RULES["linear"]) == [2, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8, 10, 12, 14, 16, 2]
    assert lengths(RULES["doubling"]) == [3] * 12 + [6] * 6 + [12] * 2 + [4]
    assert lengths(RULES["table"]) == [2] * 8 + [1] * 34 + [16] * 3 + [2]


def test_qsr_follows_the_rate_from_the_end_of_the_warm_up_on() -> None:
    """(0.05 / rate)^2: 6 at step 0, were it not warming up; then as the rate falls, the rest of the run."""
    found = lengths(RULES["qsr"])
    assert found[:3] == [4, 4, 4]
    start = 12
    for steps in found[3:-1]:
        assert steps == max(4, int((0.05 / (0.02 * (1 - start / 100))) ** 2))
        start += steps
    assert found[-1] == 100 - start
    assert found[:-1] == sorted(found[:-1])


def test_at_a_rate_of_zero_qsr_runs_to_the_end() -> None:
    assert lengths(rule(Qsr(0.05), 4, rate=lambda step: 0.0 if step >= 8 else 1.0)) == [4, 4, 92]


def test_an_epoch_and_a_rate_are_the_decimal_numbers_that_were_given() -> None:
    """The float 0.1 is a little above a tenth, and 0.3 / 0.1 a little below 3."""
    config = Config(local_steps=7, schedule="multistep:milestones=0.1", local_steps_schedule="post-local")
    assert lengths(local_steps_of(config, Fraction(10), 100, lambda step: 0.1))[:2] == [1, 7]
    assert lengths(rule(Qsr(0.3), 2, rate=lambda step: 0.1))[0] == 9
    assert (
        lengths(rule(Qsr(0.3), 2, rate=lambda step: 0.1 * 0.1), 1000)[0] == 900
    )  # 0.1 * 0.1 is a little above a hundredth
    assert lengths(rule(Qsr(0.3), 2, rate=lambda step: 0.1 * 3), 1000)[0] == 2
    assert lengths(rule(Table((0.07,), (5,)), 2, Fraction(100)), 12) == [2] * 4 + [4]  # 0.07 * 100 is a little above 7
    assert lengths(rule(Table((0.07,), (5,)), 7, Fraction(100)), 12) == [7, 5]


def drawn(random: random.Random) -> tuple[LocalSteps, int]:
    """A rule, and the steps of a run."""
    total, least = random.randrange(1, 3000), random.randrange(1, 12)
    most, of_epoch = least + random.randrange(40), Fraction(random.randrange(1, 50), random.randrange(1, 7))
    epochs = sorted(random.sample(range(1, 60), 4))
    rates: dict[str, Schedule] = {
        name: schedule_of(Config(schedule=name, **keys), of_epoch, float(total / of_epoch))  # type: ignore[arg-type]
        for name, keys in {
            "constant": {},
            "cosine": {"warmup_epochs": random.choice([0.0, 3.5]), "schedule_unit": random.choice(["epoch", "step"])},
            f"multistep:milestones={'/'.join(map(str, epochs))},gamma={random.choice([0.1, 0.7, 2.0])}": {},
        }.items()
    }
    rules = [
        rule(PostLocal(random.uniform(0.01, float(total / of_epoch))), least, of_epoch),
        rule(LinearSteps(most), least, of_epoch, total=total),
        rule(Doubling(most), least, of_epoch, total=total),
        rule(Table(tuple(map(float, epochs)), tuple(random.randrange(1, 12) for _ in epochs)), least, of_epoch),
        *(
            rule(Qsr(random.uniform(0.001, 0.2)), least, rate=rate, warmup_steps=random.choice([0, 40]))
            for rate in rates.values()
        ),
    ]
    return random.choice(rules), total


@pytest.mark.parametrize("seed", range(200))
def test_runs_of_equal_rounds_are_the_rounds_one_by_one(seed: int) -> None:
    """Also looked up from the end and in slices, and for a run of so many rounds; no two runs in a row are equal."""
    drawn_rule, total = drawn(random.Random(seed))
    expected = [*itertools.takewhile(lambda start: start < total, one_by_one(drawn_rule)), total]
    found = RoundStarts(rounds_of_steps(drawn_rule, total))
    assert list(found) == expected
    assert [found[-1 - index] for index in range(len(expected))] == expected[::-1]
    assert found[1:-1:2] == expected[1:-1:2]
    assert found.most_steps == max(after - before for before, after in itertools.pairwise(expected))
    assert all(one[0] != other[0] for one, other in itertools.pairwise(found.equal_rounds))
    with pytest.raises(IndexError):
        found[len(expected)]
    number = len(expected) // 2 + 1
    starts = RoundStarts(rounds_of_number(drawn_rule, number))
    assert list(starts) == [*itertools.islice(one_by_one(drawn_rule), number + 1)]


@pytest.mark.parametrize("seed", range(50))
def test_a_run_begins_another_where_all_its_rounds_are_the_first_of_it(seed: int) -> None:
    draw = random.Random(seed)
    one, other = ([draw.choice([1, 1, 1, 2]) for _ in range(draw.randrange(1, 5))] for _ in range(2))
    found = RoundStarts((steps, 1) for steps in one).begins(RoundStarts((steps, 1) for steps in other))
    assert found == (one == other[: len(one)])
