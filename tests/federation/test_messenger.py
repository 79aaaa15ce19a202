"""The bytes of a run, and its results, where messages leave the process: what Ray and a SuperLink do to arrays."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message

from fedsim.config import Config
from fedsim.device import resolve
from fedsim.errors import RunFailed
from fedsim.federation import client_app
from fedsim.federation.flower_internals import CLIENT_FAILED, set_message_id
from fedsim.federation.in_process import InProcessGrid
from fedsim.federation.messenger import Messenger
from fedsim.federation.protocol import MEMORY_ROUNDS, SEND_MEMORY, shared
from fedsim.federation.round import initial_progress
from fedsim.federation.server_app import train_localsgd
from fedsim.federation.strategy import build_strategy
from fedsim.models import initial_model
from fedsim.runs.records import read_rows
from fedsim.runs.run import Run
from fedsim.training.run_plan import run_plan
from strategies.tensor_array import payload_bytes, tensors_of
from tests.conftest import SMALL_BATCHNORM, Execute, assert_same_bits, final_model


class Pickled(InProcessGrid):
    """Every message is taken apart and put together again, both ways."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        ids = list(super().push_messages([pickle.loads(pickle.dumps(message)) for message in messages]))
        for message, id_ in zip(messages, ids, strict=True):
            set_message_id(message, id_)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies: list[Message] = [pickle.loads(pickle.dumps(reply)) for reply in super().pull_messages(message_ids)]
        for record in (record for reply in replies for record in reply.content.array_records.values()):
            assert all(type(array) is Array for array in record.values())
            assert payload_bytes(record) == sum(tensor.nbytes for tensor in tensors_of(record).values())
        return replies


@pytest.mark.parametrize(
    "keys", [{"model": SMALL_BATCHNORM, "optimizer": "lamb", "fraction": 0.5}, {"momentum-at-sync": "average"}]
)
def test_messages_that_leave_the_process_change_neither_bits_nor_bytes(
    small: Config, run: Execute, keys: dict[str, Any]
) -> None:
    whole = run(name="whole", rounds=4, checkpoint_every=2, **keys)
    config = resolve(small.changed({"name": "pickled", "rounds": 4, "checkpoint-every": 2, **keys}), "localsgd")
    pickled = Run(config, "localsgd")
    with Pickled(client_app.app, config) as grid:
        train_localsgd(grid, config, pickled)
    assert_same_bits(final_model(pickled), final_model(whole))
    names = ("bytes_up", "bytes_down", "overhead_bytes_up", "overhead_bytes_down")
    counted = [[{name: row[name] for name in names} for row in read_rows(one.folder)] for one in (whole, pickled)]
    assert counted[0] == counted[1]
    assert counted[0][-1]["bytes_down"] > 0


class Remote:
    """The grid of a deployment, whose clients are those of `own`."""

    def __init__(self, own: InProcessGrid) -> None:
        self.push_messages, self.pull_messages = own.push_messages, own.pull_messages


def test_a_lack_of_memory_is_believed_in_a_simulation_alone(small: Config) -> None:
    """In a deployment the client alone has failed."""
    config = resolve(small.changed({"model": "tests.own_code:Huge", "min-clients": 1}), "localsgd")
    model = initial_model(config)
    arrays = initial_progress(config, model).arrays
    keys = ConfigRecord({**shared(config), MEMORY_ROUNDS: [0] * 4, SEND_MEMORY: False})
    with InProcessGrid(client_app.app, config) as own:
        strategy = build_strategy(config, run_plan(config), model)
        messages = strategy.request(1, arrays, keys, {2: 0}).messages
        (reply,) = Messenger(Remote(own)).exchange(messages)  # type: ignore[arg-type]
        assert reply.error.code == CLIENT_FAILED
        assert str(reply.error.reason).startswith("out of memory: batch-size = 4 and model = tests.own_code:Huge")
        with pytest.raises(RunFailed, match=r"^out of memory: batch-size = 4"):
            Messenger(own).exchange(messages)


def test_an_array_that_lies_about_its_size_counts_for_what_was_sent() -> None:
    record = ArrayRecord()
    record["x"] = Array("float64", (10**12,), "numpy.ndarray", b"spam" * 10)
    assert payload_bytes(record) == 40
