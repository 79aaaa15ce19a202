"""What the processes that `tests.bits` starts import: clients' faults, on the surface of Flower alone, and their model.

A fault is an empty file WHAT-ROUND-WORKER in the folder that the environment names, removed when it happens: ``late``,
its reply comes a round late; ``left-out``, its reply is not finite; ``lost``, it has lost what it kept between rounds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Array, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid  # that of Flower's simulation
from torch import nn

FOLDER = "FEDSIM_BITS_FAULTS"
SECONDS = 120  # how long a reply is waited for


def network(classes: int, image: tuple[int, int, int]) -> nn.Module:
    """For images of 9 to 12 pixels."""
    conv, norm = nn.Conv2d(image[0], 4, 5, stride=4), nn.BatchNorm2d(4)
    return nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, classes))


def install() -> None:
    """Let the faults happen in this process: by the grids that it has imported, and by its clients."""
    for grid in {*Grid.__subclasses__(), InMemoryGrid}:
        wrap(grid)
    call = ClientApp.__call__

    def call_client(self: ClientApp, message: Message, context: Context) -> Message:
        lose_memory(message, context)
        return call(self, message, context)

    ClientApp.__call__ = call_client  # type: ignore[method-assign]


def happens(what: str, message: Message, worker: object) -> bool:
    """Whether this fault was still to happen when `message` is sent to `worker`."""
    records = message.content.config_records.values()
    round_ = next((record["server-round"] for record in records if "server-round" in record), 0)
    fault = Path(os.environ[FOLDER], f"{what}-{round_!r}-{worker!r}")
    pending = fault.exists()
    fault.unlink(missing_ok=True)
    return pending


def lose_memory(message: Message, context: object) -> None:
    if isinstance(context, Context) and happens("lost", message, context.node_config.get("partition-id")):
        context.state.clear()


class State(NamedTuple):
    """Of a grid."""

    workers: dict[int, object]  # node -> its partition-id, as it says
    late: set[str]  # ids of messages
    left_out: set[str]


def wrap(grid: Any) -> None:
    """Let the messages of a class of grids be late or wrong, and wait for those that are not."""
    push, pull = grid.push_messages, grid.pull_messages

    def state(self: Any) -> State:
        held: State = vars(self).setdefault("faults", State({}, set(), set()))
        return held

    def push_messages(self: Any, messages: Iterable[Message]) -> list[str]:
        messages, (workers, late, left_out) = list(messages), state(self)
        if any(message.metadata.message_type == "train" for message in messages):
            late.clear()  # those of the last round have come
        for held in [held for held in vars(self).values() if isinstance(held, dict)]:  # contexts, in this process
            for message in messages:
                lose_memory(message, held.get(message.metadata.dst_node_id))
        ids: list[str] = list(push(self, messages))
        for message, id_ in zip(messages, ids, strict=True):
            worker = workers.get(message.metadata.dst_node_id)
            late.update([id_] if happens("late", message, worker) else [])
            left_out.update([id_] if happens("left-out", message, worker) else [])
        return ids

    def pull_messages(self: Any, message_ids: Iterable[str]) -> list[Message]:
        workers, late, left_out = state(self)
        waiting = set(message_ids) - late
        replies: list[Message] = []
        deadline = time.monotonic() + SECONDS
        while waiting and time.monotonic() < deadline:
            replies += pull(self, waiting)
            waiting -= {reply.metadata.reply_to_message_id for reply in replies}
            time.sleep(0.05 if waiting else 0)
        for reply in filter(Message.has_content, replies):
            for metrics in reply.content.metric_records.values():
                if "partition-id" in metrics:
                    workers[reply.metadata.src_node_id] = metrics["partition-id"]
            if reply.metadata.reply_to_message_id in left_out:
                make_infinite(reply)
        return replies

    grid.push_messages, grid.pull_messages = push_messages, pull_messages


def make_infinite(reply: Message) -> None:
    for arrays in reply.content.array_records.values():
        for name, array in list(arrays.items()):
            if array.dtype.startswith("float"):
                arrays[name] = Array(np.full(array.shape, np.inf, array.dtype))
