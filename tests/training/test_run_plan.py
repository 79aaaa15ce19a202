"""Runs in which J changes; the rules by hand are in test_local_steps.py."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from fedsim.config import Config
from fedsim.device import resolve
from fedsim.errors import UserError
from fedsim.experiments.execute import execute
from fedsim.federation import client_app
from fedsim.training.local_round import RoundEnd, RoundStart, take_local_round
from fedsim.training.run_plan import RunPlan, run_plan
from tests.conftest import Execute, assert_same_bits, final_model, rows_of
from tests.federation.test_failures import answer, place, run_with

SCHEDULES: dict[str, dict[str, Any]] = {  # 32 steps of 1 client, or 8 of 4, in each of the two epochs of `small`
    "post-local": {"local-steps-schedule.switch-epoch": 0.6},
    "qsr": {"local-steps-schedule.alpha": 0.02, "schedule": "cosine", "warmup-epochs": 0.5},
    "linear": {"local-steps-schedule.max": 9},
    "doubling": {"local-steps-schedule.max": 8},
    "table": {"local-steps-schedule": "table:epochs=0.5/1.2,steps=1/5"},
}


def keys_of(schedule: str) -> dict[str, Any]:
    return {"local-steps-schedule": schedule, "record-by": "epoch", **SCHEDULES[schedule]}


def lengths(plan: RunPlan) -> list[int]:
    return [plan.steps(round_) for round_ in range(1, plan.rounds + 1)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_alone_a_client_of_any_rounds_is_centralized_training(small: Config, run: Execute, schedule: str) -> None:
    keys = {"schedule": "cosine", "warmup-epochs": 0.5}
    central = execute(resolve(small.changed({**keys, "name": "central"}), "centralized"), "centralized")
    config = resolve(small.changed({**keys, **keys_of(schedule), "clients": 1}), "localsgd")
    assert len(set(lengths(run_plan(config)))) > 1
    alone = execute(config.changed({"name": "alone"}), "localsgd")
    assert_same_bits(final_model(alone), final_model(central))
    rows = rows_of(alone)
    assert rows[-1]["steps_done"] == 64
    assert rows[-1]["syncs"] == len(lengths(run_plan(config)))
    assert [int(row["epoch"]) for row in rows] == [1, 2]


@pytest.mark.parametrize(("steps", "threads"), [(7, 0), (10, 1), (32, 1)])
def test_alone_a_client_is_centralized_training_at_every_number_of_local_steps(
    small: Config, steps: int, threads: int
) -> None:
    """Also where a last, shorter round ends the 24 steps, and with the threads that each has by default."""
    small = small.changed({"dataset.images": 48, "schedule": "cosine", "threads": threads})
    central = execute(resolve(small.changed({"name": "central"}), "centralized"), "centralized")
    keys = {"name": "alone", "clients": 1, "local-steps": steps}
    alone = execute(resolve(small.changed(keys), "localsgd"), "localsgd")
    assert_same_bits(final_model(alone), final_model(central))
    assert rows_of(alone)[-1]["steps_done"] == 24
    assert rows_of(alone)[-1]["syncs"] == -(-24 // steps)


@pytest.mark.parametrize("schedule", ["qsr", "doubling"])
def test_stopped_and_resumed_it_is_never_stopped_bitwise(small: Config, schedule: str) -> None:
    config = resolve(small.changed({**keys_of(schedule), "epochs": 3.0}), "localsgd")
    whole = execute(config.changed({"name": "whole"}), "localsgd")
    execute(config.changed({"name": "parts", "stop-after-rounds": 3}), "localsgd")
    execute(config.changed({"name": "parts", "stop-after-epochs": 2.0}), "localsgd")
    parts = execute(config.changed({"name": "parts"}), "localsgd")
    assert_same_bits(final_model(parts), final_model(whole))
    assert [row["steps_done"] for row in rows_of(whole)][-1] == 24


def test_the_budget_in_epochs_is_met_to_a_step_and_in_rounds_to_a_round(small: Config) -> None:
    assert lengths(run_plan(small.changed({"local-steps": 7, "epochs": 3.3}))) == [7, 7, 7, 5]
    for schedule in SCHEDULES:
        config = small.changed({**keys_of(schedule), "epochs": 3.3})
        assert sum(lengths(run_plan(config))) == round(3.3 * 8)
        stopped = run_plan(config.changed({"stop-after-epochs": 1.0}))
        assert stopped.first_step(stopped.last_round) < 8 <= stopped.first_step(stopped.last_round + 1)
    table = run_plan(small.changed({**keys_of("table"), "rounds": 12}))
    assert lengths(table) == [2, 2, 1, 1, 1, 1, 1, 1, 5, 5, 5, 5]
    assert table.epoch(12) == sum(lengths(table)) / 8


@pytest.mark.parametrize("schedule", ["constant", *SCHEDULES])
def test_a_run_of_a_million_epochs_has_a_plan_of_a_few_entries(small: Config, schedule: str) -> None:
    keys = keys_of(schedule) if schedule != "constant" else {"local-steps": 3}
    plan = run_plan(small.changed({**keys, "epochs": 1e6}))
    assert plan.rounds > 10**5
    assert plan.first_step(plan.rounds + 1) == 8 * 10**6
    assert len(plan.starts.equal_rounds) < 5000
    assert plan.max_steps == max(steps for steps, _ in plan.starts.equal_rounds)


def test_the_training_loss_is_the_mean_over_the_images_trained(run: Execute, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clients weigh in the mean, and also over rounds of different J."""
    keys = {name.replace("-", "_"): value for name, value in keys_of("doubling").items()}
    equal = run(name="equal", **keys)
    by_size = run(name="by-size", **{"mean.weights": "shard-size"}, **keys)
    assert_same_bits(final_model(by_size), final_model(equal))
    assert rows_of(by_size) == rows_of(equal)

    ends: list[RoundEnd] = []

    def observed(config: Config, start: RoundStart) -> RoundEnd:
        ends.append(take_local_round(config, start))
        return ends[-1]

    monkeypatch.setattr(client_app, "take_local_round", observed)
    uneven = run(
        name="uneven", **{"mean.weights": "shard-size"}, **{"dataset.images": 18}, epochs=1.0, **keys
    )  # 5, 5, 4, 4
    expected = sum(end.loss * end.samples for end in ends) / sum(end.samples for end in ends)
    assert rows_of(uneven)[-1]["train_loss"] == pytest.approx(expected, rel=1e-6)


def test_post_local_switches_at_the_first_milestone_unless_told_otherwise(small: Config) -> None:
    keys = {"local-steps-schedule": "post-local", "schedule": "multistep:milestones=0.75/1", "record-by": "epoch"}
    plan = run_plan(small.changed(keys))
    assert lengths(plan) == [1] * 6 + [2] * 5
    rates = [plan.rates(round_) for round_ in range(1, plan.rounds + 1)]
    first = next(round_ for round_, of in enumerate(rates, 1) if of[0] < rates[0][0])
    assert plan.steps(first - 1) == 1
    assert plan.steps(first) == 2
    assert lengths(run_plan(small.changed({**keys, "local-steps-schedule.switch-epoch": 0.25}))) == [1] * 2 + [2] * 7


def test_qsr_follows_the_scaled_rate_of_the_run(small: Config) -> None:
    config = small.changed(
        {**keys_of("qsr"), "epochs": 6.0, "lr-scaling": "linear:batch=8", "local-steps-schedule.alpha": 0.04}
    )
    plan = run_plan(config)
    assert plan.rates(4) != run_plan(config.changed({"lr-scaling": "none"})).rates(4)
    for round_, (start, end) in enumerate(itertools.pairwise(plan.starts), 1):
        rule = 2 if start < 4 else max(2, int((0.04 / plan.lr(start)) ** 2))
        assert end - start == (rule if round_ < plan.rounds else min(rule, 48 - start))
    assert plan.max_steps > 8


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {**keys_of("linear"), "record-by": "round"},
            "schedule = linear:max=9 makes rounds of unequal length: give --record-by",
        ),
        (
            {**keys_of("linear"), "local-steps-schedule.max": 1},
            "local-steps-schedule = linear:max=1: max is less than local-steps = 2: give more",
        ),
        ({"local-steps-schedule": "qsr"}, "local-steps-schedule = qsr needs alpha: give qsr:alpha=..."),
        ({"local-steps-schedule": "table"}, "local-steps-schedule = table needs epochs: give table:epochs=..."),
        ({"local-steps-schedule": "post-local"}, "switch-epoch = 0 needs schedule = multistep"),
        (
            {**keys_of("qsr"), "schedule": "constant", "rounds": 4, "lr": 1e-300},
            "local-steps-schedule = qsr:alpha=0.02: some J is more than 1,000,000",
        ),
        (
            {"local-steps-schedule.alpha": 0.1},
            "constant has no argument alpha",
        ),
        ({**keys_of("qsr"), "local-steps-schedule.max": 4}, "has no argument max"),
        (
            {**keys_of("doubling"), "rounds": 4},
            "rounds = 4: local-steps-schedule = doubling:max=8 needs the budget in --epochs",
        ),
        (
            {**keys_of("qsr"), "rounds": 4},
            "local-steps-schedule = qsr:alpha=0.02 needs the budget in --epochs",
        ),
    ],
)
def test_what_a_schedule_lacks_or_does_not_use_is_refused(
    run: Execute, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(**{name.replace("-", "_"): value for name, value in keys.items()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        *("epochs=10", "epochs=10,steps=0", "epochs=0,steps=3", "epochs=5/5,steps=1/2", "epochs=nan,steps=1"),
        *("epochs=true,steps=1", "epochs=10,steps=1.5", "epochs=10,steps=1/2", "epochs=a,steps=b", "steps=1"),
        f"epochs={'9' * 4000},steps=1",
    ],
)
def test_a_text_that_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^local-steps-schedule = table:"):
        Config().changed({"local-steps-schedule": f"table:{text}"}).made("local_steps_schedule")


def test_a_client_that_claims_more_samples_than_its_round_has_is_left_out(
    small: Config, caplog: pytest.LogCaptureFixture
) -> None:
    """As many as the longest round has: too many in the others."""
    config = small.changed(keys_of("doubling"))
    longest = run_plan(config).max_steps * config.batch_size

    def claim(message: Message, context: Context) -> Message:
        reply = answer(message, context)
        if place(message, context)[1] == 3:
            reply.content.metric_records["metrics"]["num-examples"] = longest
        return reply

    run_with(claim, config)
    shorter = [
        round_ for round_, steps in enumerate(lengths(run_plan(config)), 1) if config.batch_size * steps < longest
    ]
    refused = f"worker 3 is left out of the average: num-examples is {longest}"
    assert [int(message.split()[1][:-1]) for message in caplog.messages if refused in message] == shorter
