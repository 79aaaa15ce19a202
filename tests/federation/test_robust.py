"""Robust means within a run: one hostile client, whose arrays are finite and absurd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message

from fedsim.config import Config
from fedsim.errors import RunFailed, UserError
from tests.conftest import SMALL_BATCHNORM, Execute, final_model, rows_of
from tests.federation.test_failures import answer, place, run_with


def hostile(message: Message, context: Context) -> Message:
    """Worker 1 sends the largest that it can: 1e15 (in fp16: 6e4), in buffers, momenta and counters too."""
    reply = answer(message, context)
    if place(message, context)[1] == 1:
        arrays = reply.content.array_records["arrays"].to_torch_state_dict()
        largest = {torch.float32: 0.9e15, torch.float16: 6e4, torch.int64: 1000}
        absurd = {name: torch.full_like(value, largest[value.dtype]) for name, value in arrays.items()}
        reply.content["arrays"] = ArrayRecord(absurd)
    return reply


@pytest.mark.parametrize("mean", ["trimmed", "median", "clipped"])
@pytest.mark.parametrize("keys", [{"model": SMALL_BATCHNORM, "momentum-at-sync": "average"}, {"compress": "fp16"}])
def test_one_hostile_client_does_not_move_the_model_far(small: Config, mean: str, keys: dict[str, Any]) -> None:
    config = small.changed({"rounds": 3, **keys})
    robust = run_with(hostile, config.changed({"name": "robust", "mean": mean}))
    assert all(float(value.abs().max()) < 100 for value in final_model(robust).values())
    assert all(row["left_out"] == {} for row in rows_of(robust))
    exact = config.changed({"name": "exact", "rounds": 1})
    if "compress" in keys:
        assert float(final_model(run_with(hostile, exact))["fc3.weight"].abs().max()) > 1e4
    else:  # it moves the exact mean so far that the model cannot be tested
        with pytest.raises(RunFailed, match="the loss of the model in a test is nan"):
            run_with(hostile, exact)


@pytest.mark.parametrize("mean", ["trimmed", "median", "clipped"])
def test_too_few_updates_are_not_averaged(small: Config, mean: str) -> None:
    def two_fail(message: Message, context: Context) -> Message:
        if place(message, context)[1] > 1:
            raise OSError("no disk")
        return hostile(message, context)

    with pytest.raises(RunFailed, match=r"round 1: too few usable updates: worker 2"):
        run_with(two_fail, small.changed({"mean": mean}))


def test_a_trim_that_is_told_to_be_enough_is(run: Execute) -> None:
    run(mean="trimmed:trim=0.334", clients=3, rounds=1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mean.trim": 0.1}, "mean.trim = 0.1: exact has no argument trim"),
        ({"mean": "trimmed:trim=0.2"}, "mean = trimmed:trim=0.2: trim = 0.2 of 4 clients is none: give 0.25 or more"),
        (
            {"mean": "trimmed:trim=0.1", "clients": 3},
            "mean = trimmed:trim=0.1: trim = 0.1 of 3 clients is none: give 0.334 ",
        ),
        ({"mean": "trimmed", "clients": 2}, "mean = trimmed: it needs 3 clients in a round, not 2: give exact"),
        ({"mean": "median", "clients": 2}, "mean = median: it needs 3 clients in a round, not 2: give exact"),
        ({"mean": "clipped", "clients": 1}, "mean = clipped: it needs 3 clients in a round, not 1: give exact"),
        ({"mean": "median", "compress": "topk"}, "mean = median of updates of compress = topk would be 0, as most"),
        ({"mean": "median", "batchnorm_at_sync": "first-worker"}, "or --batchnorm-at-sync average"),
    ],
)
def test_what_makes_no_sense_is_refused(run: Execute, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(**keys)
    assert not list(tmp_path.iterdir())
