"""InProcessGrid: Flower's Grid within this process. No Ray, no start-up, no serialising between processes."""

from __future__ import annotations

import itertools
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

import torch
from flwr.app import ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedsim.config import Config
from fedsim.device import is_out_of_memory, thread_pool
from fedsim.federation.client_state import forget_others
from fedsim.federation.flower_internals import CLIENT_FAILED, FlowerRun, become_server, set_message_id
from fedsim.federation.protocol import MEMORY_ROUNDS
from fedsim.federation.resources import check_memory
from fedsim.interrupts import interruption
from fedsim.registry import describe
from fedsim.training.failures import place_of

TrainTogether = Callable[[Sequence[Message], Sequence[Context]], list[Message]]
SERVER_ID = 1  # Flower's node id of the server


class InProcessGrid(Grid):
    """K clients on this machine's cores: each message is handled by `client_app` in a thread of a pool.

    With `train_together`, a function of all train messages and their contexts, these are handled at once instead.
    A client's `Context`, and what it keeps in ``context.state``, lives as long as the grid. On a GPU clients
    take turns. Raises UserError where the clients need more memory than is free.
    """

    def __init__(self, client_app: ClientApp, config: Config, train_together: TrainTogether | None = None) -> None:
        check_memory(config)
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
        become_server(self._run.run_id, SERVER_ID)

    def __enter__(self) -> InProcessGrid:
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
            set_message_id(message, str(next(self._message_ids)))
        contexts = [self._contexts[message.metadata.dst_node_id] for message in messages]
        trains = bool(messages) and messages[0].metadata.message_type == MessageType.TRAIN
        if trains:
            self._free_memories(messages[0])
        if trains and self._train_together:
            try:
                replies = self._train_together(messages, contexts)
            except (Exception, SystemExit) as error:  # as if each client had raised it
                replies = [_failed(error, message) for message in messages]
        else:
            futures = [self._pool.submit(self._client_app, *pair) for pair in zip(messages, contexts, strict=True)]
            replies = [_result(future, message) for future, message in zip(futures, messages, strict=True)]
        ids = [message.metadata.message_id for message in messages]
        self._replies.update(zip(ids, replies, strict=True))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(id_) for id_ in message_ids if id_ in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The replies to `messages`. `timeout` has no effect: nothing here can be lost on the way."""
        return self.pull_messages(self.push_messages(messages))

    def _free_memories(self, message: Message) -> None:
        """Free what no client of the round that `message` begins needs any more: half of all optimizer states."""
        rounds = message.content.config_records.get("config", ConfigRecord()).get(MEMORY_ROUNDS)
        if isinstance(rounds, list):
            for context, round_ in zip(self._contexts.values(), rounds, strict=False):
                forget_others(context, round_)  # type: ignore[arg-type]


def _result(reply: Future[Message], message: Message) -> Message:
    """The client's reply to `message`, or an error reply where the client raised."""
    try:
        return reply.result()
    except (Exception, SystemExit) as error:
        return _failed(error, message)


def _failed(error: BaseException, message: Message) -> Message:
    """The error reply that Flower makes for a client that raised `error`; a lack of memory ends the run."""
    if is_out_of_memory(error) or interruption(error):
        raise error
    if place := place_of(error):
        print(f"a client failed ({describe(error)}, {place})", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
    return Message(Error(CLIENT_FAILED, f"{type(error).__name__}: {error}"), reply_to=message)
