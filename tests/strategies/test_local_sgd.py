"""The strategy by itself: its arithmetic by hand, its order, and what it leaves out."""

from __future__ import annotations

import itertools
import random
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedsim.config import Config
from fedsim.federation.flower_internals import set_message_id
from fedsim.federation.in_process import InProcessGrid
from strategies.batchnorm import FirstWorker, batchnorm_buffers
from strategies.domain import LIMIT, NOT_NEGATIVE, Domain
from strategies.layers import Layers
from strategies.local_sgd import LocalSGD, Seen, Usable
from strategies.mean import CPU_BLOCK, weighted_mean
from strategies.outer import outer_step
from strategies.screening import DECLINED

BN = nn.Sequential(OrderedDict(bn=nn.BatchNorm1d(3)))
Arrays = dict[str, np.ndarray]
VAR = "buffers/bn.running_var"
SENT: Arrays = {
    "weight": np.zeros((2, 3), np.float32),
    VAR: np.ones(3, np.float32),
    "buffers/bn.running_mean": np.zeros(3, np.float32),
    "buffers/bn.num_batches_tracked": np.array(0),
}


@pytest.fixture
def grid() -> InProcessGrid:
    """Twelve nodes, 2 to 13; their clients are not asked here."""
    return InProcessGrid(ClientApp(), Config(clients=12, device="cpu", threads=1))


def update(worker: int) -> Arrays:
    rng = np.random.default_rng(worker)
    return {
        "weight": rng.normal(size=(2, 3)).astype(np.float32),
        VAR: rng.random(3).astype(np.float32),
        "buffers/bn.running_mean": rng.normal(size=3).astype(np.float32),
        "buffers/bn.num_batches_tracked": np.array(10 + worker),
    }


def begin(grid: InProcessGrid, clients: int, **arguments: Any) -> tuple[LocalSGD, list[Message]]:
    """A strategy whose nodes 2, 3, ... hold the workers clients - 1, ..., 0, and its messages."""
    workers = {node: clients + 1 - node for node in range(2, clients + 2)}
    strategy = LocalSGD(workers=workers, seen=Seen(batchnorm=batchnorm_buffers(BN)), **arguments)
    return strategy, list(strategy.configure_train(1, ArrayRecord(_record(SENT)), ConfigRecord(), grid))


def _record(arrays: Arrays) -> dict[str, Array]:
    return {name: Array(value) for name, value in arrays.items()}


def reply(message: Message, arrays: Arrays, **metrics: Any) -> Message:
    values = MetricRecord({"num-examples": 64, "train-loss": 1.0, **metrics})
    return Message(RecordDict({"arrays": ArrayRecord(_record(arrays)), "metrics": values}), reply_to=message)


def left_out(strategy: LocalSGD) -> dict[int, str]:
    assert strategy.last is not None
    return strategy.last.left_out


def averaged(strategy: LocalSGD) -> list[int]:
    assert strategy.last is not None
    return list(strategy.last.averaged)


def numpy_of(arrays: ArrayRecord | None) -> Arrays:
    assert arrays is not None
    return {name: array.numpy() for name, array in arrays.items()}


def test_messages_go_to_every_worker_in_their_order(grid: InProcessGrid) -> None:
    _, messages = begin(grid, 4)
    assert [message.metadata.dst_node_id for message in messages] == [5, 4, 3, 2]
    assert {message.content.config_records["config"]["server-round"] for message in messages} == {1}
    assert {message.metadata.message_type for message in messages} == {"train"}


def test_without_workers_every_connected_node_is_asked(grid: InProcessGrid) -> None:
    messages = LocalSGD().configure_train(1, ArrayRecord(_record(SENT)), ConfigRecord(), grid)
    assert [message.metadata.dst_node_id for message in messages] == list(range(2, 14))


def test_a_fraction_of_the_workers_is_sampled_by_seed_and_round_not_by_node_id(grid: InProcessGrid) -> None:
    def sampled(node_of_worker: list[int], seed: int, round: int) -> list[int]:
        workers = {node: worker for worker, node in enumerate(node_of_worker)}
        strategy = LocalSGD(workers=workers, fraction_train=0.25, seed=seed)
        messages = strategy.configure_train(round, ArrayRecord(_record(SENT)), ConfigRecord(), grid)
        return [workers[message.metadata.dst_node_id] for message in messages]

    nodes = list(range(2, 14))
    every = [sampled(nodes, 1, round) for round in range(1, 40)]
    assert every == [sampled(nodes[::-1], 1, round) for round in range(1, 40)]
    assert every != [sampled(nodes, 2, round) for round in range(1, 40)]
    assert all(len(workers) == 3 and workers == sorted(workers) for workers in every)
    assert {worker for workers in every for worker in workers} == set(range(12))


def test_the_mean_by_hand(grid: InProcessGrid) -> None:
    strategy, messages = begin(grid, 2)
    updates: list[Arrays] = [
        {
            "weight": np.full((2, 3), 1, np.float32),
            "buffers/bn.running_mean": np.full(3, 2, np.float32),
            VAR: np.full(3, 4, np.float32),
            "buffers/bn.num_batches_tracked": np.array(7),
        },
        {
            "weight": np.full((2, 3), 5, np.float32),
            "buffers/bn.running_mean": np.full(3, 4, np.float32),
            VAR: np.full(3, 8, np.float32),
            "buffers/bn.num_batches_tracked": np.array(9),
        },
    ]
    replies = [
        reply(messages[0], updates[0], **{"num-examples": 30, "train-loss": 2.0}),
        reply(messages[1], updates[1], **{"num-examples": 10, "train-loss": 6.0}),
    ]
    arrays, metrics = strategy.aggregate_train(1, replies)
    mean = numpy_of(arrays)
    assert np.array_equal(mean["weight"], np.full((2, 3), 2, np.float32))
    assert np.array_equal(mean["buffers/bn.running_mean"], np.full(3, 2.5, np.float32))
    assert np.array_equal(mean[VAR], np.full(3, 5, np.float32))
    assert mean["buffers/bn.num_batches_tracked"] == 9
    assert mean["weight"].dtype == np.float32
    assert mean["buffers/bn.num_batches_tracked"].dtype == np.int64
    assert metrics == MetricRecord({"train-loss": 3.0})
    assert left_out(strategy) == {}


def test_worker_0_gives_its_batchnorm_statistics_where_asked(grid: InProcessGrid) -> None:
    strategy, messages = begin(grid, 3, layers=Layers({"batchnorm": FirstWorker()}))
    arrays, _ = strategy.aggregate_train(1, [reply(m, update(w)) for w, m in enumerate(messages)][::-1])
    mean = numpy_of(arrays)
    assert np.array_equal(mean["buffers/bn.running_mean"], update(0)["buffers/bn.running_mean"])
    assert mean["buffers/bn.num_batches_tracked"] == 10
    assert not np.array_equal(mean["weight"], update(0)["weight"])


def test_the_order_of_replies_changes_no_bit(grid: InProcessGrid) -> None:
    strategy, messages = begin(grid, 12)
    replies = [reply(m, update(w), **{"num-examples": 60 + w, "train-loss": 0.1 * w}) for w, m in enumerate(messages)]
    arrays, metrics = strategy.aggregate_train(1, replies)
    for seed in range(5):
        random.Random(seed).shuffle(replies)
        again, metrics_again = strategy.aggregate_train(1, replies)
        assert all(np.array_equal(numpy_of(arrays)[name], numpy_of(again)[name]) for name in SENT)
        assert metrics == metrics_again


@pytest.mark.parametrize("clients", [1, 3, 4, 10, 12])
def test_identical_workers_average_to_themselves(clients: int) -> None:
    for dtype, seed in itertools.product((np.float32, np.float64), range(20)):
        value = torch.from_numpy(np.random.default_rng(seed).normal(size=1000).astype(dtype))
        before = value.clone()
        assert torch.equal(weighted_mean([value] * clients, [1 / clients] * clients), before)
        assert torch.equal(value, before)  # in float64 the sum is not taken in the workers' own arrays


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_leaves_its_arguments_as_they_are(dtype: torch.dtype) -> None:
    parts = [torch.full((3,), float(value), dtype=dtype) for value in range(3)]
    weighted_mean(parts, [0.2, 0.3, 0.5])
    assert [float(part[0]) for part in parts] == [0, 1, 2]


def test_layout_changes_no_bit_of_the_mean() -> None:
    parts = [torch.randn(5, 7, 3, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    plain = weighted_mean(parts, [0.2, 0.3, 0.5])
    last = weighted_mean([part.to(memory_format=torch.channels_last) for part in parts], [0.2, 0.3, 0.5])
    assert torch.equal(plain, last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_leaves_its_parts_as_they_are(dtype: torch.dtype) -> None:
    parts = [torch.full((3,), value, dtype=dtype) for value in (1.0, 3.0)]
    assert weighted_mean(parts, [0.5, 0.5]).tolist() == [2.0] * 3
    assert [part.tolist() for part in parts] == [[1.0] * 3, [3.0] * 3]


def test_blocks_change_no_bit_of_the_mean() -> None:
    rows = 2 * CPU_BLOCK // 100 + 7
    parts = [torch.randn(rows, 100, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    whole = weighted_mean(parts, [0.2, 0.3, 0.5])
    each = [weighted_mean([part[row] for part in parts], [0.2, 0.3, 0.5]) for row in range(rows)]
    assert torch.equal(whole, torch.stack(each))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
def test_a_number_and_an_empty_array_have_a_mean(shape: tuple[int, ...]) -> None:
    mean = weighted_mean([torch.full(shape, 1.0), torch.full(shape, 2.0)], [0.5, 0.5])
    assert torch.equal(mean, torch.full(shape, 1.5))


def test_a_plain_float32_mean_would_not_be_exact() -> None:
    value = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    plain = sum(np.float32(1 / 12) * value for _ in range(12))
    assert not np.array_equal(plain, value)


def _nan(arrays: Arrays) -> Arrays:
    arrays["weight"][1, 2] = np.nan
    return arrays


BAD: dict[str, tuple[Callable[[Arrays], Arrays], dict[str, Any], str]] = {
    "nan": (_nan, {}, "weight is not finite"),
    "inf": (lambda a: a | {"weight": a["weight"] + np.float32(np.inf)}, {}, "weight is not finite"),
    "shape": (lambda a: a | {"weight": a["weight"].T}, {}, r"weight is float32 \[3, 2\], not as it was sent"),
    "dtype": (lambda a: a | {"weight": a["weight"].astype(np.float64)}, {}, r"weight is float64 \[2, 3\]"),
    "missing": (lambda a: {"weight": a["weight"]}, {}, "its arrays differ from those sent"),
    "renamed": (lambda a: {"w" if k == "weight" else k: v for k, v in a.items()}, {}, "differ from those sent"),
    "zero weight": (lambda a: a, {"num-examples": 0}, "num-examples is 0"),
    "negative weight": (lambda a: a, {"num-examples": -5}, "num-examples is -5"),
    "nan weight": (lambda a: a, {"num-examples": float("nan")}, "num-examples is nan"),
    "listed weight": (lambda a: a, {"num-examples": [1, 2]}, r"num-examples is \[1, 2\]"),
    "absurd weight": (lambda a: a, {"num-examples": 1e30}, r"num-examples is 1e\+30"),
    "weight above a float": (lambda a: a, {"num-examples": 10**400}, "num-examples is 1000"),
    "loss at the end of floats": (lambda a: a, {"train-loss": 1.797e308}, r"train-loss is 1\.797e\+308"),
    "loss above a float": (lambda a: a, {"train-loss": -(10**400)}, "train-loss is -1000"),
    "infinite extra metric": (lambda a: a, {"accuracy": float("-inf")}, "accuracy is -inf"),
    "infinity in a list": (lambda a: a, {"accuracies": [0.5, float("inf")]}, "accuracies is inf"),
    "negative variance": (lambda a: a | {VAR: np.array([1, -1e6, 1], np.float32)}, {}, f"{VAR} is negative"),
    "flood": (lambda a: a, {"spam": [0.5] * 1001}, "its metrics are more than 1000 numbers"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_update_is_left_out_and_named(grid: InProcessGrid, what: str) -> None:
    change, metrics, reason = BAD[what]
    strategy, messages = begin(grid, 3)
    good = [reply(messages[w], update(w)) for w in (0, 2)]
    expected, _ = strategy.aggregate_train(1, good)
    arrays, _ = strategy.aggregate_train(1, [*good, reply(messages[1], change(update(1)), **metrics)])
    assert all(np.array_equal(numpy_of(arrays)[name], numpy_of(expected)[name]) for name in SENT)
    assert list(left_out(strategy)) == [1]
    assert re.search(reason, left_out(strategy)[1])


def test_the_two_largest_losses_that_may_be_averaged_have_a_mean(grid: InProcessGrid) -> None:
    strategy, messages = begin(grid, 2)
    largest = {"train-loss": LIMIT}
    _, metrics = strategy.aggregate_train(1, [reply(m, update(w), **largest) for w, m in enumerate(messages)])
    assert metrics is not None
    assert dict(metrics) == largest


@pytest.mark.parametrize("what", ["error", "decline", "name", "dtype", "metric"])
def test_what_a_client_says_becomes_one_short_printable_line(
    grid: InProcessGrid, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = "\x1b[31mfine\nround 9: worker 0 is left out\u202e" + "x" * 1_000_000
    strategy, messages = begin(grid, 2)
    bad = reply(messages[1], update(1))
    if what == "error":
        bad = Message(Error(2, text), reply_to=messages[1])
    elif what == "decline":
        bad = Message(RecordDict({DECLINED: ConfigRecord({"reason": text})}), reply_to=messages[1])
    elif what == "name":
        bad.content.array_records["arrays"][f"a{text}"] = Array(np.zeros(1))
    elif what == "dtype":
        bad.content.array_records["arrays"]["weight"] = Array(text, (2, 3), "numpy.ndarray", b"")
    else:
        bad.content.metric_records["metrics"][text] = float("nan")
    strategy.aggregate_train(1, [reply(messages[0], update(0)), bad])
    (reason,) = left_out(strategy).values()
    assert len(reason) <= 200
    assert "fine" in reason
    assert reason.isprintable()
    assert reason in caplog.text
    assert len(caplog.text) < 1000


def test_a_server_state_out_of_the_domain_fails(grid: InProcessGrid) -> None:
    strategy = LocalSGD(layers=Layers({"outer": outer_step("fedadam")}))
    x = ArrayRecord(_record({"x": np.zeros(1)}))
    request = strategy.request(1, x, ConfigRecord(), {2: 0, 3: 1})
    far = [reply(message, {"x": np.full(1, 1e14)}) for message in request.messages]
    with pytest.raises(FloatingPointError, match="round 1: the server's state of outer/x/v is above 1e15"):
        strategy.aggregate(1, request, far, {})


def test_bytes_that_are_no_array_are_left_out(grid: InProcessGrid) -> None:
    strategy, messages = begin(grid, 2)
    broken = reply(messages[1], update(1))
    broken.content.array_records["arrays"]["weight"] = Array("float32", (2, 3), "numpy.ndarray", b"\x93NUMPY cut")
    arrays, _ = strategy.aggregate_train(1, [reply(messages[0], update(0)), broken])
    assert np.array_equal(numpy_of(arrays)["weight"], update(0)["weight"])
    assert "weight cannot be read" in left_out(strategy)[1]


def test_a_failed_client_is_left_out_with_its_reason(grid: InProcessGrid) -> None:
    strategy, messages = begin(grid, 2)
    failed = Message(Error(2, "no disk"), reply_to=messages[1])
    arrays, _ = strategy.aggregate_train(1, [reply(messages[0], update(0)), failed])
    assert np.array_equal(numpy_of(arrays)["weight"], update(0)["weight"])
    assert left_out(strategy) == {1: "its client failed (no disk)"}


def _npy(shape: str) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(24)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (_npy("(1000000000000,)"), "weight cannot be read"),
        (_npy("(3, 2)"), r"weight is float32 \[3, 2\], not as it was sent"),
        (b"PK\x03\x04" + bytes(20), "weight cannot be read"),
        (_npy("(2, 3)") + bytes(100_000), "weight holds 100152 bytes, more than 1048"),
    ],
)
def test_bytes_that_lie_about_their_array_are_left_out(grid: InProcessGrid, data: bytes, reason: str) -> None:
    strategy, messages = begin(grid, 2)
    lying = reply(messages[1], update(1))
    lying.content.array_records["arrays"]["weight"] = Array("float32", (2, 3), "numpy.ndarray", data)
    arrays, _ = strategy.aggregate_train(1, [reply(messages[0], update(0)), lying])
    assert np.array_equal(numpy_of(arrays)["weight"], update(0)["weight"])
    assert re.search(reason, left_out(strategy)[1])


def test_records_beside_those_asked_for_leave_a_client_out(grid: InProcessGrid) -> None:
    strategy, messages = begin(grid, 2)
    stuffed = reply(messages[1], update(1))
    stuffed.content["more"] = ConfigRecord({"padding": bytes(1000)})
    strategy.aggregate_train(1, [reply(messages[0], update(0)), stuffed])
    assert averaged(strategy) == [0]
    assert left_out(strategy) == {1: "it sent other records than arrays and one of metrics"}


@pytest.mark.parametrize("value", [float("nan"), "low", None])
def test_a_metric_asked_for_must_be_a_finite_number(grid: InProcessGrid, value: Any) -> None:
    strategy, messages = begin(grid, 2, usable=Usable(metrics={"train-loss": NOT_NEGATIVE}))
    bad = reply(messages[0], update(0))
    record = bad.content.metric_records["metrics"]
    del record["train-loss"]
    if isinstance(value, float):
        record["train-loss"] = value
    _, metrics = strategy.aggregate_train(1, [bad, reply(messages[1], update(1))])
    assert metrics is not None
    assert metrics["train-loss"] == 1.0
    assert left_out(strategy)[0].startswith("train-loss is ")


def test_more_examples_than_there_can_be_leave_a_client_out(grid: InProcessGrid) -> None:
    strategy, messages = begin(grid, 2, usable=Usable(examples=lambda round_, worker: Domain(0, 64)))
    strategy.aggregate_train(1, [reply(messages[0], update(0)), reply(messages[1], update(1), **{"num-examples": 65})])
    assert left_out(strategy) == {1: "num-examples is 65"}


def test_a_late_and_a_second_reply_change_nothing(grid: InProcessGrid) -> None:
    strategy, messages = begin(grid, 2)
    for number, message in enumerate(messages):
        set_message_id(message, f"round 1, {number}")
    first = [reply(messages[0], update(0)), reply(messages[1], update(1))]
    expected, _ = strategy.aggregate_train(1, first)
    earlier = Message(RecordDict(), messages[1].metadata.dst_node_id, "train")
    set_message_id(earlier, "round 0, 1")
    late = reply(earlier, update(7))
    arrays, _ = strategy.aggregate_train(1, [late, first[0], first[1], reply(messages[1], update(8))])
    assert all(np.array_equal(numpy_of(arrays)[name], numpy_of(expected)[name]) for name in SENT)
    assert left_out(strategy) == {}


def test_who_does_not_answer_is_named_and_the_weights_sum_to_one_over_who_did(grid: InProcessGrid) -> None:
    strategy, messages = begin(grid, 3)
    ones = {name: np.ones_like(value) for name, value in SENT.items()}
    replies = [reply(messages[0], ones, **{"num-examples": 10}), reply(messages[2], ones, **{"num-examples": 50})]
    arrays, _ = strategy.aggregate_train(1, replies)
    assert all(np.array_equal(numpy_of(arrays)[name], ones[name]) for name in SENT)
    assert (averaged(strategy), left_out(strategy)) == ([0, 2], {1: "it did not answer"})


def test_who_is_away_moves_no_other_worker_of_a_sample(grid: InProcessGrid) -> None:
    everyone = {node: node - 2 for node in range(2, 14)}
    for round in range(1, 20):
        whole, part = (
            LocalSGD(workers=workers, population=12, fraction_train=0.5, seed=3)
            for workers in (everyone, {node: worker for node, worker in everyone.items() if worker != 5})
        )
        asked = [
            {m.metadata.dst_node_id for m in s.configure_train(round, ArrayRecord(_record(SENT)), ConfigRecord(), grid)}
            for s in (whole, part)
        ]
        assert asked[1] == asked[0] - {7}
        part.aggregate_train(round, [])
        assert left_out(part).get(5) == ("its node is not connected" if 7 in asked[0] else None)


def test_fewer_updates_than_asked_for_are_no_average(grid: InProcessGrid) -> None:
    strategy, messages = begin(grid, 3, usable=Usable(least=3))
    assert strategy.aggregate_train(1, [reply(m, update(0)) for m in messages[:2]]) == (None, None)
    assert (averaged(strategy), left_out(strategy)) == ([], {2: "it did not answer"})
    arrays, _ = strategy.aggregate_train(1, [reply(m, update(0)) for m in messages])
    assert np.array_equal(numpy_of(arrays)["weight"], update(0)["weight"])


def test_no_usable_update_is_no_average(grid: InProcessGrid) -> None:
    strategy, messages = begin(grid, 2)
    assert strategy.aggregate_train(1, [reply(m, _nan(update(0))) for m in messages]) == (None, None)
    assert sorted(left_out(strategy)) == [0, 1]


def test_it_serves_any_flower_project() -> None:
    """Flower's own loop, `Strategy.start`, with a client that knows nothing of fedsim."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        (value,) = message.content.array_records["arrays"].to_numpy_ndarrays()
        moved = ArrayRecord({"x": Array(value + float(context.node_config["partition-id"]))})
        return Message(RecordDict({"arrays": moved, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "loss": 0.5})}), reply_to=message)

    with InProcessGrid(app, Config(clients=3, device="cpu", threads=1)) as grid:
        result = LocalSGD().start(grid, ArrayRecord({"x": Array(np.zeros(2))}), num_rounds=4)
    assert result.arrays["x"].numpy().tolist() == [4.0, 4.0]
    assert result.evaluate_metrics_clientapp[4]["loss"] == 0.5
