"""FleetGrid: Flower's Grid within this process. No Ray, no start-up, no serialising between processes."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterable, Sequence

import torch
from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run as FlowerRun
from flwr.supercore.task_identity import TaskIdentity

from fedsim.config import Config
from fedsim.device import thread_pool
from fedsim.federation.node_registry import CLIENT_FAILED

TrainTogether = Callable[[Sequence[Message], Sequence[Context]], list[Message]]
SERVER_ID = 1  # Flower's node id of the server


class FleetGrid(Grid):
    """K clients on this machine's cores: each message is handled by `client_app` in a thread of a pool.

    With `train_together`, a function of all train messages and their contexts, these are handled at once instead.
    A client's `Context`, and what it keeps in ``context.state``, lives as long as the grid. On a GPU clients
    take turns.
    """

    def __init__(self, client_app: ClientApp, config: Config, train_together: TrainTogether | None = None) -> None:
        self._client_app = client_app
        self._train_together = train_together
        self._run = FlowerRun.create_empty(run_id=1)
        self._contexts = {
            node: Context(
                run_id=self._run.run_id,
                node_id=node,
                node_config={"partition-id": worker, "num-partitions": config.clients},
                state=RecordDict(),
                run_config=dict(config.as_keys()),
            )
            for worker, node in enumerate(range(SERVER_ID + 1, SERVER_ID + 1 + config.clients))
        }
        self._message_ids = itertools.count(1)
        self._replies: dict[str, Message] = {}
        self._pool = thread_pool(torch.device(config.device), config.threads)
        # Flower's Message reads the sender from here; in a process of Flower's own it is set at its start
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, self._run.run_id, SERVER_ID

    def __enter__(self) -> FleetGrid:
        return self

    def __exit__(self, *exception: object) -> None:
        # An interrupted round is not waited for: a client's local steps may take minutes
        self._pool.shutdown(wait=exception[0] is None, cancel_futures=True)

    def set_run(self, run: FlowerRun) -> None:
        self._run = run

    @property
    def run(self) -> FlowerRun:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have every message handled; returns their ids when all are."""
        messages = list(messages)
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(next(self._message_ids))
        if self._train_together and messages and messages[0].metadata.message_type == MessageType.TRAIN:
            contexts = [self._contexts[message.metadata.dst_node_id] for message in messages]
            replies = self._train_together(messages, contexts)
        else:
            replies = list(self._pool.map(self._handle, messages))
        ids = [message.metadata.message_id for message in messages]
        self._replies.update(zip(ids, replies, strict=True))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(id) for id in message_ids if id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The replies to `messages`. `timeout` is not looked at: nothing here can be lost on the way."""
        return self.pull_messages(self.push_messages(messages))

    def _handle(self, message: Message) -> Message:
        """The client's reply, or Flower's error reply where it raised."""
        try:
            return self._client_app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:
            traceback.print_exc()
            return Message(Error(CLIENT_FAILED, f"{type(error).__name__}: {error}"), reply_to=message)
