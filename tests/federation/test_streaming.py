"""Runs in which messages hold a fragment of the model: what they must equal, and what a lost client does."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from fedsim.config import Config
from fedsim.federation.protocol import MEMORY_LOST
from fedsim.models import cpu_model
from strategies.streaming import fragments_of
from tests.conftest import SMALL_BATCHNORM, Call, Execute, assert_same_bits, final_model, rows_of
from tests.federation.equal_runs import resumed_and_pickled
from tests.federation.test_failures import UPDATE, fail, forget, once, run_with


def test_one_fragment_that_is_not_delayed_is_diloco_bitwise(run: Execute) -> None:
    keys = {"model": SMALL_BATCHNORM, "epochs": 1.0}
    diloco = run(name="diloco", outer="diloco", **keys)
    streaming = run(name="streaming", outer="streaming:fragments=1,delay=0,mix=0", **keys)
    assert_same_bits(final_model(streaming), final_model(diloco))
    assert rows_of(streaming) == rows_of(diloco)


@pytest.mark.parametrize(
    "keys",
    [
        {"outer": "streaming:fragments=3,delay=2", "model": SMALL_BATCHNORM},
        {"outer": "streaming", "compress": "powersgd", "compress-down": "powersgd", "local-rule": "scaffold"},
        {"outer": "streaming:fragments=2", "compress": "topk", "compress-down": "int8", "momentum-at-sync": "average"},
    ],
)
def test_resumed_and_pickled_it_is_the_same_run_bitwise(small: Config, run: Execute, keys: dict[str, Any]) -> None:
    resumed_and_pickled(small, run, {"rounds": 7, "checkpoint-every": 2, **keys})


def test_a_run_of_fewer_rounds_than_fragments_is_refused_in_a_line(call: Call) -> None:
    code, _, error = call("localsgd", "--dataset", "synthetic:images=256", "--rounds", "3", "--outer", "streaming")
    assert code == 2
    assert error.count("\n") == 1
    assert "outer = streaming sends each part of the model once in 4 rounds, the run has 3: give more rounds" in error


def test_a_round_sends_one_fragment(run: Execute, small: Config) -> None:
    """After the first one, whose messages hold the model; in the next ones nothing has arrived yet."""
    rows = rows_of(run(outer="streaming:fragments=3,delay=1", rounds=6, momentum_at_sync="reset"))
    parameters = dict(cpu_model(small).named_parameters())
    sizes = [sum(parameters[name].nbytes for name in names) for names in fragments_of(parameters, 3)]
    assert sum(sizes) == UPDATE
    sent = [
        [4 * sizes[round_ % 3] for round_ in range(6)],
        [4 * UPDATE, 0, *(4 * size for size in sizes), 4 * sizes[0]],
    ]
    for way, expected in zip(("up", "down"), sent, strict=True):
        found = [row[f"bytes_{way}"] for row in rows]
        assert [after - before for before, after in itertools.pairwise([0, *found])] == expected
        assert rows[-1][f"peak_bytes_{way}"] == max(expected[1:] if way == "down" else expected)


@pytest.mark.parametrize("fault", [forget, fail])
def test_a_client_that_was_left_out_begins_from_the_model_it_is_sent(small: Config, run: Execute, fault: Any) -> None:
    keys = {"outer": "streaming:fragments=2", "checkpoint-every": 2, "rounds": 8, "min-clients": 1}
    left_out = run_with(once(6, 2, fault), small.changed({**keys, "name": "left-out"}))
    rows = rows_of(left_out)
    assert [list(row["left_out"]) for row in rows] == [[]] * 5 + [["2"]] + [[]] * 2
    if fault is forget:
        assert rows[5]["left_out"] == {"2": MEMORY_LOST}
    sent = [after["bytes_down"] - before["bytes_down"] for before, after in itertools.pairwise(rows)]
    assert sent[5] == 3 * sent[3] // 4 + UPDATE
    assert sent[6] == sent[4]
