"""Slow workers and absent ones: what each does in a round, and runs with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsim.config import Config
from fedsim.data.partition import shard_sizes
from fedsim.device import resolve
from fedsim.errors import UserError
from fedsim.experiments.cost import cost, sampled, traffic
from fedsim.experiments.execute import execute
from fedsim.federation import client_app
from fedsim.training.local_round import RoundEnd, RoundStart, take_local_round
from fedsim.training.run_plan import run_plan
from fedsim.training.stacked import check_stackable
from fedsim.training.workers import Turn, Uneven
from strategies.mean import mean
from tests.conftest import Execute, assert_same_bits, final_model, rows_of
from tests.federation.equal_runs import resumed_and_pickled

EACH = [(worker, round_) for worker in range(40) for round_ in range(1, 51)]


def test_speeds_and_absences_are_as_the_arguments_say() -> None:
    """Of numbers drawn by the seed, the round and the worker: a speed stays a worker's own unless it varies."""
    slow, varying = Uneven((0.25, 0.75)), Uneven((0.25, 0.75), varies=True)
    steps = {each: slow.steps(Turn(*each, 100, seed=1)) for each in EACH}
    assert all(steps[worker, round_] == steps[worker, 1] for worker, round_ in EACH)
    assert min(steps.values()) in range(25, 32)
    assert max(steps.values()) in range(69, 76)
    assert steps != {each: slow.steps(Turn(*each, 100, seed=2)) for each in EACH}
    changing = [varying.steps(Turn(*each, 100, seed=1)) for each in EACH]
    assert len(set(changing)) == 51
    assert sum(changing) / len(changing) == pytest.approx(50, abs=1)
    away = [Uneven(away=0.2).is_away(Turn(*each, 1, seed=1)) for each in EACH]
    assert sum(away) / len(away) == pytest.approx(0.2, abs=0.02)
    assert Uneven((0.1, 0.1)).steps(Turn(0, 1, 4, 1)) == 1
    assert Uneven((0.5, 0.5)).steps(Turn(0, 1, 9, 1)) == 4  # 4.5, to the even one


def test_a_slow_worker_takes_the_first_steps_of_the_round_and_weighs_as_the_others(
    run: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its update counts as any other, and its loss by the images that it has trained on."""
    ends: dict[int, RoundEnd] = {}

    def observed(config: Config, start: RoundStart) -> RoundEnd:
        ends[start.worker] = end = take_local_round(config, start)
        return end

    monkeypatch.setattr(client_app, "take_local_round", observed)
    keys = {"precision": "fp64", "rounds": 1, "local_steps": 4}
    usual = run(name="usual", **keys)
    assert_same_bits(final_model(run(name="same", workers="uneven", **keys)), final_model(usual))
    uneven = run(name="uneven", workers="uneven:speed=0.25/1", **keys)
    plan = run_plan(resolve(Config().changed({"workers": "uneven:speed=0.25/1", "local-steps": 4}), "localsgd"))
    steps = [plan.steps_of(1, worker, 0) for worker in range(4)]
    assert sorted(set(steps)) != [4]
    expected = mean([ends[worker].weights for worker in range(4)], [0.25] * 4)
    torch.testing.assert_close(final_model(uneven), expected, rtol=0, atol=1e-15)
    (row,) = rows_of(uneven)
    losses = [float(ends[worker].loss) * count for worker, count in enumerate(steps)]
    assert row["train_loss"] == pytest.approx(sum(losses) / sum(steps))
    assert row["steps_done"] == 4

    # One that takes 2 of 4 steps ends where it ends in a round of 2
    half = run(name="half", workers="uneven:speed=0.5/0.5", **keys)
    two = run(name="two", **{**keys, "local_steps": 2})
    assert_same_bits(final_model(half), final_model(two))


@pytest.mark.parametrize(
    "keys",
    [
        {"workers": "uneven:speed=0.3/1,away=0.4", "local-steps": 4},
        {"workers": "uneven:speed=0.3/1,varies=true", "local-steps": 4, "local-rule": "fednova"},
        {"workers": "uneven:away=0.5", "compress-down": "topk", "fraction": 0.5, "min-clients": 2},
        {"workers": "uneven:away=0.3,speed=0.5/0.5", "local-rule": "scaffold", "local-steps": 4},
        {"workers": "uneven:away=0.3,speed=0.3/1", "local-epochs": 1, "local-steps": 10, "batch-size": 3},
    ],
)
def test_resumed_and_pickled_it_is_the_same_run_bitwise(small: Config, run: Execute, keys: dict[str, Any]) -> None:
    keys = {"rounds": 6, "checkpoint-every": 1, "momentum-at-sync": "reset", "dataset.images": 64, **keys}
    whole = resumed_and_pickled(small, run, keys).whole
    assert rows_of(whole)[-1]["updates_left_out"] == 0


def test_the_cost_counts_the_steps_taken_and_the_messages_sent(small: Config, run: Execute) -> None:
    keys = {"workers": "uneven:speed=0.3/1,away=0.4", "local-steps": 4, "rounds": 6}
    config = resolve(small.changed(keys), "localsgd")
    plan, rounds = run_plan(config), list(sampled(config))
    held = shard_sizes(config)
    images = sum(
        4 * plan.steps_of(r, worker, held[worker]) for r, workers in enumerate(rounds, 1) for worker in workers
    )
    assert cost(config, "localsgd").images == images < 6 * 4 * 4 * 4
    row = rows_of(execute(config.changed({"name": "run"}), "localsgd"))[-1]
    whole, _ = traffic(config)
    assert (whole.up, whole.down) == (row["bytes_up"], row["bytes_down"])
    assert whole.up * 24 == traffic(small.changed({"rounds": 6}))[0].up * sum(map(len, rounds))
    assert len({len(workers) for workers in rounds}) > 1


def test_as_many_workers_stay_as_a_round_needs(small: Config) -> None:
    """Of five, all away nearly always: three for a median, the first ones of those away."""
    config = resolve(small.changed({"workers": "uneven:away=0.99", "mean": "median", "clients": 5}), "localsgd")
    rounds = list(sampled(config.changed({"rounds": 40})))
    assert {len(workers) for workers in rounds} <= {3, 4}
    assert rounds.count([0, 1, 2]) > 30


def test_fednova_divides_updates_by_the_steps_taken_and_of_equal_ones_is_the_mean(run: Execute) -> None:
    """In a run; on quadratics: `test_fednova_comes_nearer_where_workers_take_unequal_steps`."""
    keys = {"precision": "fp64", "rounds": 2, "local_steps": 4, "momentum_at_sync": "reset"}
    for speeds, equal in (("0.5/0.5", True), ("0.25/1", False)):
        runs = [
            run(name=f"{rule}-{equal}", workers=f"uneven:speed={speeds}", local_rule=rule, **keys)
            for rule in ("none", "fednova")
        ]
        plain, nova = (final_model(each)["fc3.weight"] for each in runs)
        assert bool((plain - nova).abs().max() < 1e-14) == equal


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"local-rule": "scaffold-inferred", "momentum": 0.0, "weight-decay": 0.0, "workers": "uneven:speed=0.5/1"},
            "workers = uneven:speed=0.5/1: local-rule = scaffold-inferred needs as many local steps of each client",
        ),
        (
            {"layer": "delay", "workers": "uneven:away=0.1"},
            "workers = uneven:away=0.1: layer = delay needs all clients",
        ),
        ({"workers": "uneven:speed=1/0.5"}, "workers = uneven:speed=1/0.5: speed must be ascending"),
        (
            {"workers": "uneven:speed=0/1"},
            "workers = uneven:speed=0/1: uneven: speed = 0/1 must be 2 numbers with a / between, each",
        ),
        ({"workers": "uneven:away=1"}, "workers = uneven:away=1: uneven: away = 1 must be a number at least 0 and"),
    ],
)
def test_what_does_not_go_with_them_is_refused(run: Execute, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        run(**{name.replace("-", "_"): value for name, value in keys.items()})
    assert str(caught.value).startswith(message)


def test_unequal_steps_cannot_be_stacked(small: Config) -> None:
    check_stackable(small.changed({"workers": "uneven:away=0.5"}))
    with pytest.raises(UserError, match=r"workers = uneven:speed=0.5/1: some clients take fewer steps than others: "):
        check_stackable(small.changed({"workers": "uneven:speed=0.5/1"}))
