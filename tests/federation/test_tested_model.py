"""A moving average of the models, tested in place of the last one, within a run."""

from __future__ import annotations

from typing import Any

import torch

from tests.conftest import Execute, assert_same_bits, final_model, rows_of


def test_it_changes_what_is_tested_and_nothing_that_is_trained(run: Execute) -> None:
    keys = {"rounds": 4, "fraction": 0.5}
    plain, averaged = run(name="plain", **keys), run(name="averaged", test_model="ema:decay=0.5", **keys)
    assert_same_bits(final_model(averaged), final_model(plain))
    for ours, theirs in zip(rows_of(averaged), rows_of(plain), strict=True):
        assert {n: v for n, v in ours.items() if "test_" not in n} == {
            n: v for n, v in theirs.items() if "test_" not in n
        }
    assert rows_of(averaged)[0] == rows_of(plain)[0]
    assert rows_of(averaged)[-1]["test_loss"] != rows_of(plain)[-1]["test_loss"]
    tested = torch.load(averaged.folder / "tested-model.pt", weights_only=True)
    assert not torch.equal(tested["fc3.weight"], final_model(plain)["fc3.weight"])
    assert not (plain.folder / "tested-model.pt").exists()


def test_without_decay_it_is_the_model_itself(run: Execute) -> None:
    plain, same = run(name="plain", rounds=3), run(name="same", rounds=3, test_model="ema:decay=0")
    assert rows_of(same) == rows_of(plain)
    tested = torch.load(same.folder / "tested-model.pt", weights_only=True)
    assert_same_bits(tested, final_model(plain))


def test_a_resumed_run_without_a_round_left_has_it(run: Execute) -> None:
    keys: dict[str, Any] = {"name": "stopped", "test_model": "ema:decay=0.5", "stop_after_rounds": 2}
    first = torch.load(run(**keys).folder / "tested-model.pt", weights_only=True)
    again = torch.load(run(**keys).folder / "tested-model.pt", weights_only=True)
    assert_same_bits(again, first)
