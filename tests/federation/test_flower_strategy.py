"""Runs with Flower's strategies and the user's: cut and resumed, rolled back, refused, failed, and on Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message

from fedsim.config import Config
from fedsim.errors import RunFailed, UserError
from tests.conftest import SMALL_BATCHNORM, Execute, assert_same_bits, final_model, rows_of
from tests.federation.test_failures import answer, forget, once, place, run_with

OF_FLOWER, OF_USER = "flwr.serverapp.strategy:", "tests.strategies.user_strategies:"
KEYS: dict[str, Any] = {
    "model": SMALL_BATCHNORM,
    "dataset.images": 64,
    "batch_size": 2,
    "rounds": 4,
    "evaluate_every": 4,
}


@pytest.mark.parametrize(
    ("strategy", "arguments"),
    [
        (OF_USER + "SlowMo", "beta=0.6"),
        (OF_FLOWER + "FedAdam", "eta=0.001"),
    ],
)
def test_cut_and_resumed_or_rolled_back_it_is_the_same_run_bitwise(
    run: Execute, small: Config, strategy: str, arguments: str
) -> None:
    """With BatchNorm, of which Flower's FedAdam would make NaN, and optimizer states that are averaged or kept."""
    keys = {
        **KEYS,
        "outer": f"{strategy}:{arguments}" if arguments else strategy,
        "min_clients": 4,
        "checkpoint_every": 2,
    }
    whole = run(name="whole", **keys)
    run(name="parts", stop_after_rounds=1, **keys)
    kebab = {name.replace("_", "-"): value for name, value in keys.items()}
    back = run_with(once(4, 2, forget), small.changed({"name": "back", **kebab}))
    for other in (run(name="parts", **keys), back):
        assert_same_bits(final_model(other), final_model(whole))
        assert rows_of(other) == rows_of(whole)
    assert final_model(whole)["bn1.num_batches_tracked"].equal(torch.tensor(8))


def test_a_users_slowmo_is_ours(run: Execute) -> None:
    keys = {**KEYS, "model": "lenet5", "precision": "fp64", "fraction": 0.5, "momentum_at_sync": "average"}
    theirs = final_model(run(name="theirs", outer=OF_USER + "SlowMo", **keys))
    ours = final_model(run(name="ours", outer="slowmo", **keys))
    plain = final_model(run(name="plain", **keys))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-12)
    assert float((theirs["fc3.weight"] - plain["fc3.weight"]).abs().max()) > 1e-6


def test_a_hostile_update_does_not_reach_the_strategy(small: Config) -> None:
    """Alone, the one client that is left is enough: Flower's strategies would wait for two."""

    def infinite(message: Message, context: Context) -> Message:
        reply = answer(message, context)
        if place(message, context)[1] > 0:
            arrays = reply.content.array_records["arrays"].to_torch_state_dict()
            arrays["fc3.bias"][0] = torch.inf
            reply.content["arrays"] = ArrayRecord(arrays)
        return reply

    result = run_with(infinite, small.changed({"rounds": 2, "outer": OF_FLOWER + "FedYogi"}))
    assert [sorted(row["left_out"]) for row in rows_of(result)] == [["1", "2", "3"]] * 2
    assert all(value.isfinite().all() for value in final_model(result).values())


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (
            "LaterAnObject",
            "round 5: it cannot be saved: its attribute generator holds a Random: keep arrays and numbers",
        ),
        ("LaterAnError", r"round 5: it failed \(KeyError: 5, in line \d+ of .*user_strategies.py\)"),
    ],
)
def test_one_that_fails_later_ends_the_run_in_one_line(run: Execute, strategy: str, words: str) -> None:
    with pytest.raises(RunFailed, match=f"^outer = {OF_USER}{strategy}: {words}") as caught:
        run(outer=OF_USER + strategy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"outer": "fedavg"}, "outer = fedavg is unknown: it must be one of none, fedavgm"),
        ({"outer": OF_FLOWER + "FedAdm"}, "has no function or class FedAdm"),
        (
            {"outer": OF_FLOWER + "FedProx"},
            "a trial on made-up updates failed: round 1: it sets proximal-mu for the clients",
        ),
        (
            {"outer": OF_USER + "Wrapper"},
            "a trial on made-up updates failed: round 1: it cannot be saved: its attribute inner holds a FedAdam",
        ),
        ({"outer": OF_FLOWER + "FedAdam:etta=1"}, "has no argument etta .did you mean eta..: it must be one of eta"),
        (
            {"outer": OF_FLOWER + "FedAdam", "compress": "fp16"},
            "compress = fp16: outer = flwr.* needs models as they are",
        ),
        ({"outer": OF_FLOWER + "FedAdam", "mean": "median"}, "mean = median: outer = flwr.* needs the exact mean"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(
    run: Execute, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(**keys)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
