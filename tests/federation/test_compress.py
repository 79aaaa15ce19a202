"""Compressed updates within a run; the codecs are tested in tests/strategies/test_compression.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message
from torch import Tensor

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.federation import client_app
from fedsim.federation.protocol import MEMORY_LOST
from fedsim.runs.records import read_rows
from fedsim.training.local_round import RoundEnd, RoundStart, take_local_round
from tests.conftest import Execute, assert_same_bits, final_model, rows_of
from tests.federation.equal_runs import resumed_and_pickled
from tests.federation.test_failures import UPDATE, answer, forget, once, place, run_with

SHAPES = ((6, 75), (6,), (16, 150), (16,), (120, 400), (120,), (84, 120), (84,), (10, 84), (10,))  # of lenet5
SIZES = [torch.Size(shape).numel() for shape in SHAPES]


def test_where_every_value_is_sent_it_is_no_compression_to_rounding(run: Execute) -> None:
    plain = final_model(run(name="plain", rounds=3))
    for codec in ("topk", "randomk"):
        whole = final_model(run(name=codec, rounds=3, compress=codec, **{"compress.ratio": 1}))
        for name, value in whole.items():
            torch.testing.assert_close(value, plain[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("codec", ["topk", "powersgd"])
def test_resumed_and_pickled_it_is_the_same_run_bitwise(small: Config, run: Execute, codec: str) -> None:
    """With its residuals and warm starts, whether or not they are a client's only memory."""
    keys = {"rounds": 5, "clients": 2, "compress": codec, "checkpoint-every": 2}
    if codec == "topk":
        keys["momentum-at-sync"] = "reset"
    whole, _, pickled = resumed_and_pickled(small, run, keys)
    assert [row["bytes_up"] for row in read_rows(pickled.folder)] == [
        row["bytes_up"] for row in read_rows(whole.folder)
    ]
    without = run(name="without", **{**keys, "error-feedback": False})
    assert not torch.equal(final_model(without)["fc3.weight"], final_model(whole)["fc3.weight"])


def test_a_client_that_lost_its_residual_sends_all_back_to_the_checkpoint(small: Config, run: Execute) -> None:
    keys = {"compress": "topk", "momentum-at-sync": "reset", "checkpoint-every": 2}
    whole = run(name="whole", **{name.replace("-", "_"): value for name, value in keys.items()})
    lost = run_with(once(6, 2, forget), small.changed({**keys, "name": "lost", "min-clients": 4}))
    assert_same_bits(final_model(lost), final_model(whole))
    left_out = run_with(once(6, 2, forget), small.changed({**keys, "name": "left-out"}))
    assert [row["left_out"] for row in rows_of(left_out)] == [{}] * 5 + [{"2": MEMORY_LOST}] + [{}] * 2


@pytest.mark.parametrize(
    ("codec", "update"),
    [
        ("bf16", sum(2 * size for size in SIZES)),
        ("int8", sum(size + 4 for size in SIZES)),
        ("sign", sum(-(-size // 8) + 4 for size in SIZES)),
        ("topk", sum(8 * max(1, size // 100) for size in SIZES)),
        ("randomk", sum(4 * max(1, size // 100) for size in SIZES)),
        ("qsgd", sum(-(-size // 128) * (64 + 4) for size in SIZES)),
        ("powersgd", 4 * sum(4 * sum(s) if len(s) > 1 and 4 * sum(s) < s[0] * s[1] else s[0] for s in SHAPES)),
    ],
)
def test_the_bytes_of_a_row_are_those_of_the_formula(run: Execute, codec: str, update: int) -> None:
    keys = {"error_feedback": False} if codec != "powersgd" else {"checkpoint_every": 3}
    row = read_rows(run(rounds=2, compress=codec, momentum_at_sync="reset", **keys).folder)[-1]
    assert row["bytes_down"] == 2 * 4 * UPDATE
    assert row["bytes_up"] == 2 * 4 * update


def test_what_cannot_be_decoded_is_left_out(small: Config) -> None:
    def bad(message: Message, context: Context) -> Message:
        reply = answer(message, context)
        round_, worker = place(message, context)
        if worker == 1:
            arrays: dict[str, Tensor] = dict(reply.content.array_records["arrays"].to_torch_state_dict())
            if round_ == 1:
                arrays["fc3.bias/places"][0] = 10
            elif round_ == 2:
                arrays["fc3.bias/values"] = arrays["fc3.bias/values"].double()
            else:
                arrays = {"fc3.bias": arrays["fc3.bias/values"]}
            reply.content["arrays"] = ArrayRecord(arrays)
        return reply

    rows = rows_of(run_with(bad, small.changed({"rounds": 3, "compress": "topk"})))
    reasons = ("a place is outside the tensor", "fc3.bias/values is float64 [1], not as it was sent", "its arrays ")
    for row, reason in zip(rows, reasons, strict=True):
        assert row["left_out"]["1"].startswith(reason)


def test_a_scale_that_overflows_and_weights_that_are_infinite_are_left_out(
    small: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(config: Config, start: RoundStart) -> RoundEnd:
        end = take_local_round(config, start)
        if start.worker == 2:
            end.weights["fc3.bias"].fill_(torch.inf)
        return end

    def large(message: Message, context: Context) -> Message:
        reply = answer(message, context)
        if place(message, context)[1] == 1:
            arrays: dict[str, Tensor] = dict(reply.content.array_records["arrays"].to_torch_state_dict())
            arrays["fc3.bias/scale"] = torch.tensor(9e14)
            reply.content["arrays"] = ArrayRecord(arrays)
        return reply

    monkeypatch.setattr(client_app, "take_local_round", diverging)
    [row] = rows_of(run_with(large, small.changed({"rounds": 1, "compress": "int8"})))
    assert row["left_out"] == {"1": "fc3.bias is above 1e15", "2": "fc3.bias is not finite"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"compress.ratio": 0.1},
            "compress.ratio = 0.1: none has no argument ratio",
        ),
        ({"compress": "int8:levels=5"}, "int8 has no argument levels: it takes none"),
        ({"compress": "topk+randomk"}, "a chain is topk, chunked-topk or randomk, then a codec of each value"),
        (
            {"compress": "qsgd:levels=5"},
            "levels = 5: what messages leave out would grow: give 6 or more, or --no-error-feedback",
        ),
        ({"error_feedback": False}, "error-feedback is not used by compress = none"),
    ],
)
def test_a_key_that_the_codec_does_not_use_is_refused(
    run: Execute, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(**keys)
    assert not list(tmp_path.iterdir())
