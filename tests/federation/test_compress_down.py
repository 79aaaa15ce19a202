"""Compression of what the server sends: the model that all hold, who gets it whole, and the bytes both ways."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message
from torch import Tensor

from fedsim.config import Config
from fedsim.device import resolve
from fedsim.errors import UserError
from fedsim.federation import client_app
from fedsim.federation.in_process import InProcessGrid
from fedsim.federation.protocol import MEMORY_LOST
from fedsim.federation.server_app import train_localsgd
from fedsim.registry import CODECS
from fedsim.runs.records import read_rows
from fedsim.runs.run import Run
from fedsim.training.local_round import RoundEnd, RoundStart, take_local_round
from strategies.local_sgd import LocalSGD
from strategies.wire import HELD, WIRE
from tests.conftest import Execute, assert_same_bits, final_model, rows_of
from tests.federation.equal_runs import resumed_and_pickled
from tests.federation.test_compress import SIZES
from tests.federation.test_failures import UPDATE, Fault, fail, faulty, forget, nothing, once, refused, run_with
from tests.federation.test_messenger import Pickled

TOPK = sum(8 * max(1, size // 100) for size in SIZES)  # bytes of an encoded update of lenet5
INT8 = sum(size + 4 for size in SIZES)


def checkpoint_of(run: Run) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(run.folder / "checkpoint.pt", weights_only=True)
    return checkpoint


@pytest.mark.parametrize("codec", list(CODECS.places))
def test_server_and_clients_hold_the_same_model_bitwise(
    small: Config, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    """Also where messages are pickled, so that nothing is shared; and it is not the server's model."""
    begun: dict[tuple[int, int], dict[str, Tensor]] = {}

    def observed(config: Config, start: RoundStart) -> RoundEnd:
        begun[start.round, start.worker] = start.weights
        return take_local_round(config, start)

    monkeypatch.setattr(client_app, "take_local_round", observed)
    keys = {"dataset.images": 128, "batch-size": 4, "clients": 2, "rounds": 3, "compress-down": codec}
    config = resolve(small.changed({**keys, "momentum-at-sync": "reset", "lr": 0.05}), "localsgd")
    run = Run(config, "localsgd")
    with Pickled(client_app.app, config) as grid:
        train_localsgd(grid, config, run)
    state = checkpoint_of(run)["state"]
    assert sorted(begun) == [(round_, worker) for round_ in (1, 2, 3) for worker in (0, 1)]
    for worker in (0, 1):
        assert_same_bits(begun[3, worker], {name: state[WIRE][HELD + name] for name in begun[3, worker]})
    assert_same_bits(begun[2, 0], begun[2, 1])
    moved = sum(float((begun[3, 0][name] - begun[2, 0][name]).abs().sum()) for name in begun[2, 0])
    assert moved > 0
    row = read_rows(run.folder)[-1]
    assert row["bytes_down"] < (2 + 2.1) * UPDATE  # two models, and 4 messages of at most half of one


def test_where_every_value_is_sent_it_is_no_compression_to_rounding(run: Execute) -> None:
    for outer in ("none", "diloco"):
        plain = final_model(run(name=f"plain-{outer}", rounds=3, outer=outer))
        whole = final_model(run(name=outer, rounds=3, outer=outer, compress_down="topk:ratio=1"))
        for name, value in whole.items():
            torch.testing.assert_close(value, plain[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "keys",
    [
        {"compress-down": "topk", "fraction": 0.5, "momentum-at-sync": "reset"},
        {"compress-down": "powersgd", "compress": "qsgd", "outer": "slowmo"},
        {"compress-down": "randomk", "momentum-at-sync": "average"},
    ],
)
def test_resumed_and_pickled_it_is_the_same_run_bitwise(small: Config, run: Execute, keys: dict[str, Any]) -> None:
    """Rows too, bytes included: a model that is handed back on resume counts as overhead."""
    keys = {"rounds": 5, "checkpoint-every": 2, **keys}
    whole, parts, pickled = resumed_and_pickled(small, run, keys)
    assert_same_bits(*(checkpoint_of(one)["state"][WIRE] for one in (parts, whole)))
    assert read_rows(parts.folder)[-1]["overhead_bytes_down"] > 0
    assert [row["bytes_down"] for row in read_rows(pickled.folder)] == [
        row["bytes_down"] for row in read_rows(whole.folder)
    ]


def test_a_client_that_lost_its_model_gets_it_whole_or_sends_all_back(small: Config, run: Execute) -> None:
    keys = {"compress-down": "topk", "momentum-at-sync": "reset", "checkpoint-every": 2}
    whole = run(name="whole", **keys)
    lost = run_with(once(6, 2, forget), small.changed({**keys, "name": "lost", "min-clients": 4}))
    assert_same_bits(final_model(lost), final_model(whole))
    assert rows_of(lost) == rows_of(whole)

    left_out = run_with(once(6, 2, forget), small.changed({**keys, "name": "left-out"}))
    rows = rows_of(left_out)
    assert [row["left_out"] for row in rows] == [{}] * 5 + [{"2": MEMORY_LOST}] + [{}] * 2
    assert rows[6]["bytes_down"] - rows[5]["bytes_down"] == 3 * TOPK + UPDATE
    assert rows[7]["bytes_down"] - rows[6]["bytes_down"] == 4 * TOPK


def test_of_a_sample_those_of_the_last_one_get_the_change(small: Config, run: Execute) -> None:
    rows = rows_of(run(fraction=0.5, compress_down="int8", rounds=8))
    strategy = LocalSGD(fraction_train=0.5, seed=small.seed)
    sampled = [set(strategy.sample(round_, list(range(4)))) for round_ in range(1, 9)]
    again = [0, *(len(one & other) for one, other in itertools.pairwise(sampled))]
    assert set(again) == {0, 1, 2}
    sent = [row["bytes_down"] for row in rows]
    assert [after - before for before, after in itertools.pairwise([0, *sent])] == [
        count * INT8 + (2 - count) * UPDATE for count in again
    ]


class Counting(InProcessGrid):
    """Counts the bytes of all arrays that come and go, as NumPy arrays; the first reply of round `late` is delayed."""

    up = down = late = 0
    held: tuple[str, ...] = ()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        self.down += sum(map(size, messages))
        ids = list(super().push_messages(messages))
        config = messages[0].content.config_records["config"]
        self.held = (ids[0],) if config.get("server-round") == self.late else ()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = list(super().pull_messages(set(message_ids) - set(self.held)))
        self.up += sum(size(reply) for reply in replies if reply.has_content())
        return replies


def size(message: Message) -> int:
    records: list[ArrayRecord] = list(message.content.array_records.values())
    return sum(array.numpy().nbytes for record in records for array in record.values())


@pytest.mark.parametrize(
    ("fault", "keys", "late", "down"),
    [
        (nothing, {}, 0, 4 * UPDATE + 28 * INT8),
        # Worker 1, whose update was refused, gets the whole model in round 4
        (once(3, 1, refused), {}, 0, 5 * UPDATE + 27 * INT8),
        (nothing, {"round-timeout": 0.01}, 3, 5 * UPDATE + 27 * INT8),
        # The round is repeated: what it sent the first time is overhead
        (once(3, 1, fail), {"min-clients": 4}, 0, 4 * UPDATE + 28 * INT8),
        (once(6, 2, forget), {"min-clients": 4}, 0, 4 * UPDATE + 28 * INT8),
    ],
)
def test_the_bytes_of_the_rows_are_those_of_all_messages(
    small: Config, fault: Fault, keys: dict[str, Any], late: int, down: int
) -> None:
    codecs = {"compress": "topk", "compress-down": "int8", "checkpoint-every": 2}
    config = resolve(small.changed({**codecs, "momentum-at-sync": "reset", **keys}), "localsgd")
    run = Run(config, "localsgd")
    grid = Counting(faulty(fault), config)
    grid.late = late
    with grid:
        train_localsgd(grid, config, run)
    row = read_rows(run.folder)[-1]
    averaged = 8 * 4 - sum(len(one["left_out"]) for one in read_rows(run.folder))
    assert (row["bytes_up"], row["bytes_down"]) == (averaged * TOPK, down)
    assert [row[f"bytes_{way}"] + row[f"overhead_bytes_{way}"] for way in ("up", "down")] == [grid.up, grid.down]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"compress_down": "qsgd:levels=5"}, "compress-down = qsgd:levels=5: levels = 5: what messages"),
        ({"compress_down": "int8", "error_feedback": False}, "error-feedback is not used by compress = none"),
    ],
)
def test_what_makes_no_sense_is_refused(run: Execute, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(**keys)
    assert not list(tmp_path.iterdir())
