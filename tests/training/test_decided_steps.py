"""J decided while a run trains: the rules by hand, and runs with them."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest

from fedsim.config import Config
from fedsim.device import resolve
from fedsim.errors import UserError
from fedsim.experiments.cost import cost, traffic
from fedsim.experiments.execute import execute
from fedsim.federation.decisions import planned
from fedsim.federation.traffic import messages_of
from fedsim.runs.checkpoint_file import parse_checkpoint
from fedsim.training.local_steps import AdaComm, NetworkSteps, Outline, SoFar
from fedsim.training.run_plan import run_plan
from tests.conftest import Execute, assert_same_bits, final_model, rows_of
from tests.federation.equal_runs import resumed_and_pickled

RUN = Outline(16, Fraction(10), 1000, lambda step: 0.1, 0, 0.0)
CONSTANT_LOSS = {"model": "tests.own_code:constant", "record_by": "epoch", "epochs": 4.0, "local_steps": 3}


def decided(schedule: AdaComm, losses: list[float]) -> list[int]:
    """J of each round; `losses` are those of the rounds before."""
    steps, state = schedule.decide(RUN, SoFar(0, 16, None, lambda network: 0.0), {})
    found, step = [steps], steps
    for loss in losses:
        steps, state = schedule.decide(RUN, SoFar(step, steps, loss, lambda network: 0.0), state)
        found.append(steps)
        step += steps
    return found


def test_adacomm_by_hand() -> None:
    """At every epoch of 10 steps, where a round begins after it: of losses 4, 1 and 0.04, a half and a tenth of J."""
    assert decided(AdaComm(), [4.0, 1.0, 0.04, 4.0, 0.0]) == [16, 16, 8, 2, 2, 2]
    assert decided(AdaComm(every=4.0), [4.0, 1.0, 0.04]) == [16, 16, 16, 2]
    assert decided(AdaComm(shrink=0.5), [4.0, 5.0, 0.5]) == [16, 8, 4, 4]


def test_on_a_network_messages_take_at_most_their_share() -> None:
    """Of a sync of 3 s: at steps of 20 ms and a tenth of the time, 27 s of steps."""
    schedule = NetworkSteps(bandwidth="1MB", step="20ms", latency="500ms")
    assert schedule.decide(RUN, SoFar(0, 16, None, lambda network: 3.0), {}) == (1350, {"steps": 1350})
    assert schedule.decide(RUN, SoFar(0, 16, None, lambda network: 0.01), {}) == (16, {"steps": 16})
    assert schedule.decide(RUN, SoFar(16, 16, None, lambda network: 3.0), {"steps": 16}) == (16, {"steps": 16})
    half = NetworkSteps(bandwidth="1MB", step="20ms", share=0.5)
    assert half.decide(RUN, SoFar(0, 16, None, lambda network: 3.0), {}) == (150, {"steps": 150})


def test_of_a_network_j_is_the_planners(small: Config, run: Execute) -> None:
    """The bytes of a client's messages over its own link, both ways, and two latencies."""
    schedule = "network:bandwidth=8Mbit,latency=1ms,step=100ms,share=0.5"
    config = resolve(small.changed({"local-steps-schedule": schedule, "record-by": "epoch"}), "localsgd")
    up, down = messages_of(config).later
    expected = math.ceil((0.002 + (up + down) / 1e6) / 0.1)
    plan = planned(config)
    assert plan.steps(1) == expected > 2
    result = execute(config.changed({"name": "run"}), "localsgd")
    assert rows_of(result)[-1]["steps_done"] == 16
    assert rows_of(result)[0]["round_steps"] == expected
    assert (rows_of(result)[-1]["bytes_up"], rows_of(result)[-1]["bytes_down"]) == traffic(config)[0]
    constant = run(name="constant", local_steps=expected, record_by="epoch")
    assert_same_bits(final_model(result), final_model(constant))
    assert rows_of(result) == rows_of(constant)
    compressed = planned(config.changed({"compress": "sign", "compress-down": "sign"}))
    assert compressed.steps(1) < expected
    assert cost(config, "localsgd").syncs == plan.rounds


def test_adacomm_with_a_constant_loss_is_constant_j_bitwise(run: Execute) -> None:
    constant = run(name="constant", **CONSTANT_LOSS)
    adacomm = run(name="adacomm", local_steps_schedule="adacomm", **CONSTANT_LOSS)
    assert len({row["train_loss"] for row in rows_of(constant)}) == 1
    assert_same_bits(final_model(adacomm), final_model(constant))
    assert rows_of(adacomm) == rows_of(constant)
    shrinking = run(name="shrinking", local_steps_schedule="adacomm:shrink=0.4", **CONSTANT_LOSS)
    assert [row["round_steps"] for row in rows_of(shrinking)] == [3, 2, 1, 1]


@pytest.mark.parametrize(
    "keys",
    [
        {"local-steps-schedule": "adacomm:every=0.5,shrink=0.6"},
        {"local-steps-schedule": "adacomm:every=0.5,shrink=0.6", "workers": "uneven:speed=0.5/1,away=0.2"},
        {"local-steps-schedule": "adacomm:every=0.5,shrink=0.6", "schedule": "cosine", "compress": "qsgd:levels=40"},
        {"local-steps-schedule": "tests.own_methods:Growing", "compress-down": "randomk:ratio=0.5"},
        {"local-steps-schedule": "tests.own_methods:Growing", "local-rule": "scaffold-inferred", "momentum": 0.0},
    ],
)
def test_resumed_and_pickled_it_is_the_same_run_bitwise(small: Config, run: Execute, keys: dict[str, Any]) -> None:
    keys = {"record-by": "epoch", "checkpoint-every": 1, "local-steps": 4, "epochs": 5.0, "weight-decay": 0.0, **keys}
    whole = resumed_and_pickled(small, run, keys).whole
    rows = rows_of(whole)
    assert rows[-1]["steps_done"] == 40
    assert len({row["round_steps"] for row in rows}) > 1
    config = resolve(small.changed(keys), "localsgd")
    checkpoint = parse_checkpoint((whole.folder / "checkpoint.pt").read_bytes())
    plan = run_plan(config, checkpoint["decided"])
    assert plan.rounds == rows[-1]["round"]
    assert sum(plan.steps(round_) for round_ in range(1, plan.rounds + 1)) == 40


def test_a_budget_in_rounds_is_so_many_rounds(run: Execute) -> None:
    keys = {"local_steps_schedule": "tests.own_methods:Growing", "record_by": "epoch", "local_steps": 1}
    rows = rows_of(run(rounds=5, **keys))
    assert (rows[-1]["round"], rows[-1]["steps_done"]) == (5, 1 + 2 + 3 + 4 + 5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"local-steps-schedule": "adacomm", "record-by": "round"}, "makes rounds of unequal length: give --record-by"),
        ({"local-steps-schedule": "adacomm", "rounds": 4, "schedule": "cosine"}, "needs the budget in --epochs"),
        (
            {"local-steps-schedule": "adacomm", "local-epochs": 1},
            "is not used with local-epochs = 1: leave one of them",
        ),
        ({"local-steps-schedule": "network:step=1ms"}, "network needs bandwidth: give network:bandwidth=..."),
        (
            {"local-steps-schedule": "network:bandwidth=9,step=1ms"},
            "bandwidth = '9' is not a number above 0 with one of",
        ),
        (
            {"local-steps-schedule": "tests.own_methods:Halting"},
            "decides on J = 0 at step 0: it must be a whole number",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(run: Execute, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(**{"record_by": "epoch", **{name.replace("-", "_"): value for name, value in keys.items()}})


def test_a_run_is_not_lengthened_as_its_j_was_decided(run: Execute) -> None:
    keys = {"local_steps_schedule": "adacomm", "record_by": "epoch", "name": "one"}
    run(epochs=1.0, **keys)
    with pytest.raises(
        UserError, match=r"J of its rounds was decided while it trained \(adacomm\): give another --name"
    ):
        run(epochs=2.0, **keys)
