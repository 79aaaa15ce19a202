"""InProcessGrid: Flower's Grid within this process. No Ray, no start-up, no serialising between processes."""

from __future__ import annotations

import functools
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
from fedsim.device import pool_size, thread_pool
from fedsim.federation.client_app import train_together
from fedsim.federation.client_state import forget_others
from fedsim.federation.flower_internals import CLIENT_FAILED, FlowerRun, become_server, set_message_id
from fedsim.federation.protocol import MEMORY_ROUNDS
from fedsim.registry import describe
from fedsim.training.failures import place_of
from fedsim.training.stacked import StackedWorkers

Handled = Future[list[Message]]  # the replies to a group
Handler = Callable[[Sequence[Message], Sequence[Context]], list[Message]]  # of the messages of a group
SERVER_ID = 1  # Flower's node id of the server


class InProcessGrid(Grid):
    """K clients on this machine's cores: groups of messages are handled by the threads of a pool (`thread_pool`).

    A group is one message, handled by `client_app`. Where `trainers` are given, the train messages of a round are
    divided among these instead, in the order of workers and as evenly as possible.
    A client's `Context`, and what it keeps in ``context.state``, lives as long as the grid.
    """

    def __init__(self, client_app: ClientApp, config: Config, trainers: Sequence[Handler] = ()) -> None:
        self._client_app = client_app
        self._trainers = trainers
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
        trains = bool(messages) and messages[0].metadata.message_type == MessageType.TRAIN
        if trains:
            self._free_memories(messages[0])
        for group, handled in self._divided(messages) if trains and self._trainers else self._one_by_one(messages):
            for message, reply in zip(group, _replies(group, handled), strict=True):
                self._replies[message.metadata.message_id] = reply
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(id_) for id_ in message_ids if id_ in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The replies to `messages`. `timeout` has no effect: nothing here can be lost on the way."""
        return self.pull_messages(self.push_messages(messages))

    def _one_by_one(self, messages: Sequence[Message]) -> list[tuple[Sequence[Message], Handled]]:
        """Each of `messages` as a group that a thread handles."""
        pairs = [([message], self._contexts_of([message])) for message in messages]
        # `list` calls the client, in the thread
        return [(group, self._pool.submit(list, map(self._client_app, group, contexts))) for group, contexts in pairs]

    def _divided(self, messages: Sequence[Message]) -> list[tuple[Sequence[Message], Handled]]:
        """The share of `messages` of each trainer that has something to do, as a group that a thread handles."""
        in_order = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        parts = len(self._trainers)
        ends = [len(in_order) * part // parts for part in range(parts + 1)]
        shares = [in_order[begin:end] for begin, end in itertools.pairwise(ends)]
        return [
            (share, self._pool.submit(train, share, self._contexts_of(share)))
            for train, share in zip(self._trainers, shares, strict=True)
            if share
        ]

    def _contexts_of(self, messages: Sequence[Message]) -> list[Context]:
        return [self._contexts[message.metadata.dst_node_id] for message in messages]

    def _free_memories(self, message: Message) -> None:
        """Free what no client of the round that `message` begins needs any more: half of all optimizer states."""
        rounds = message.content.config_records.get("config", ConfigRecord()).get(MEMORY_ROUNDS)
        if isinstance(rounds, list):
            for context, round_ in zip(self._contexts.values(), rounds, strict=False):
                forget_others(context, round_)  # type: ignore[arg-type]


def stacked_trainers(config: Config, by_products: bool = False) -> list[Handler]:
    """A trainer for each thread of the pool, whose group of clients is one stacked network."""
    groups = pool_size(torch.device(config.device), config.threads)
    return [functools.partial(train_together, StackedWorkers(by_products).take_rounds) for _ in range(groups)]


def _replies(group: Sequence[Message], handled: Handled) -> list[Message]:
    """The replies to the messages of `group`, or an error reply to each where their handler raised.

    In a thread of the pool no signal is handled: what exits there is a client.
    """
    error = handled.exception()
    if isinstance(error, Exception | SystemExit):
        return [_failed(error, message) for message in group]
    return handled.result()


def _failed(error: BaseException, message: Message) -> Message:
    """The error reply that Flower makes for a client that raised `error`."""
    if place := place_of(error):
        print(f"a client failed ({describe(error)}, {place})", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
    return Message(Error(CLIENT_FAILED, f"{type(error).__name__}: {error}"), reply_to=message)
