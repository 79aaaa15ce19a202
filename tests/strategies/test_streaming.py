"""Streaming DiLoCo's fragments, against torchft's and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from strategies.averaging import send, update
from strategies.layers import Layers
from strategies.mean import Exact
from strategies.method import ServerRound, State, Update, WorkerRound
from strategies.streaming import Streaming, fragments_of
from strategies.wire import receive
from tests.conftest import Call

OF_TORCHFT: list[dict[str, Any]] = json.loads(Path(__file__).with_name("torchft_streaming.json").read_text())["runs"]


@pytest.mark.parametrize("run", OF_TORCHFT, ids=lambda run: "{fragments} {delay} {mix}".format(**run))
def test_workers_begin_where_those_of_torchft_begin(run: dict[str, Any]) -> None:
    """Each holds what it was sent of the model, and is sent no more than a fragment."""
    layers = Layers({"outer": Streaming(run["fragments"], run["delay"], run["mix"])})
    x = {f"{layer}.weight": torch.tensor(values) for layer, values in enumerate(run["start"])}
    state: State = {}
    memories: list[dict[str, Tensor]] = [{}, {}]
    held = [x, x]
    for round_, (moves, begins) in enumerate(zip(run["moves"], run["begins"], strict=True), 1):
        server = ServerRound(round_, True, x, x)
        sent = send(layers, server, {}, state, range(2))
        for worker, move in enumerate(moves):
            if sent.change is not None:
                assert len(sent.change) == (round_ > 1 + run["delay"])
                held[worker] = receive(None, held[worker], sent.change, 0)
            begun = sent.begun if sent.change is None else held[worker]
            r = WorkerRound(worker, round_, 1, lambda _: [0.1], True, 0.0, begun, begun, {})
            layers.begin(r, memories[worker], {})
            torch.testing.assert_close([r.start[name].tolist() for name in x], begins[worker], rtol=0, atol=1e-6)
            r.y = {name: y + torch.tensor(moved) for (name, y), moved in zip(r.start.items(), move, strict=True)}
            replies, memories[worker] = layers.end(r, memories[worker], {})
            message, _ = layers.message(r, r.y, memories[worker])
            assert not replies
            assert message.keys() == {f"{(round_ - 1) % run['fragments']}.weight"}
            server.updates = {**server.updates, worker: Update(1, message, {}, {"outer": {}}, {})}
        server.weights = [0.5, 0.5]
        state = update(layers, Exact(), server, sent, state) | ({"wire": sent.wire} if sent.wire else {})
        x = server.next_x


def test_fragments_are_layers_of_about_the_same_size() -> None:
    sizes = {"a.weight": 6, "a.bias": 1, "b.weight": 4, "c.weight": 2, "c.bias": 1, "d": 1}
    fragments = fragments_of({name: torch.zeros(size) for name, size in sizes.items()}, 2)
    assert fragments == [{"a.weight", "a.bias", "d"}, {"b.weight", "c.weight", "c.bias"}]


def test_what_does_not_go_together_is_refused_in_a_line(call: Call) -> None:
    keys = ("localsgd", "--dataset", "synthetic", "--model", "lenet5", "--outer")
    for text, others, expected in (
        ("streaming:fragments=2,delay=2", (), "delay = 2 is not below fragments = 2"),
        ("streaming:fragments=9", (), "fragments = 9: the model has 5 layers with parameters: give fewer"),
        ("streaming", ("--fraction", "0.5"), "fraction = 0.5: outer = streaming needs all clients in each round"),
        ("streaming", ("--layer", "delay"), "outer = streaming does not go with layer = delay"),
        ("streaming", ("--local-rule", "fednova", "--momentum-at-sync", "reset"), "local-rule = fednova needs clients"),
        ("streaming", ("--local-rule", "feddyn"), "local-rule = feddyn needs"),
    ):
        code, _, error = call(*keys, text, *others)
        assert (code, expected in error) == (2, True), error
