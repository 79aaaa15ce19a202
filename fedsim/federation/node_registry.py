"""The server's talk with its nodes: who is there, and what they keep between rounds."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.federation.protocol import STATE, STATE_ROUNDS, shared
from strategies import tensor_record, tensors_like

JOIN_SECONDS = 120  # how long nodes may take to connect: a SuperLink takes a killed one for connected for a minute
CLIENT_FAILED = 2  # Flower's error code of a ClientApp that raised
ANSWER_SECONDS = 120  # how long a node may take to answer a question; Flower starts a process for it
LOOK_SECONDS = 0.1  # between two looks for replies

Nodes = dict[int, int]  # Flower's (random) node id -> worker, its partition-id


class Roster:
    """Which node is which worker: asked of each node, since Flower's node ids are random."""

    def __init__(self, grid: Grid, config: Config) -> None:
        self.nodes: Nodes = {}  # in the order of the workers
        self._grid, self._clients = grid, config.clients
        self._question = RecordDict({"config": ConfigRecord({**shared(config)})})
        self._strangers: set[int] = set()  # nodes that came later and cannot take part

    def call(self, least: int) -> None:
        """Ask every node anew. Nodes may join two minutes late; then `least` of them are enough.

        A node that cannot take part fails: one of a federation of another size, or whose own configuration is wrong.
        """
        self.nodes = {}
        deadline = time.monotonic() + JOIN_SECONDS
        while True:
            self.nodes |= self._workers([node for node in self._grid.get_node_ids() if node not in self.nodes])
            if len(self.nodes) >= self._clients or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        self._check(least)

    def update(self) -> None:
        """Take in nodes that have connected since; one that holds the shard of another takes its place."""
        for node in self._grid.get_node_ids():
            if node in self.nodes or node in self._strangers:
                continue
            try:
                come = self._workers([node])
            except UserError as error:
                self._strangers.add(node)
                print(f"a node that has connected is left out: {error}", flush=True)
                continue
            self.nodes = {n: worker for n, worker in self.nodes.items() if worker not in come.values()} | come
            self._sort()

    def _workers(self, nodes: Iterable[int]) -> Nodes:
        """The workers that `nodes` are, without those that do not answer."""
        workers = {}
        for node, reply in ask(self._grid, "query.partition", dict.fromkeys(nodes, self._question)).items():
            if reply.has_error():
                if reply.error.code == CLIENT_FAILED:
                    raise UserError(f"a node cannot take part: {reply.error.reason}")
                continue
            held = reply.content.metric_records.get("partition", MetricRecord())
            worker, number = held.get("partition-id"), held.get("num-partitions")
            if number != self._clients:
                raise UserError(
                    f"clients = {self._clients}, but the federation has {number} nodes: make them equal, by "
                    f"-c clients=N, or in a simulation by --federation-config num-supernodes={self._clients}"
                )
            if not isinstance(worker, int):
                raise UserError(f"a node holds shard {worker}: give it a partition-id, a whole number")
            workers[node] = worker
        return workers

    def _check(self, least: int) -> None:
        shards = sorted(self.nodes.values())
        if len(shards) < least:
            raise UserError(
                f"clients = {self._clients}, but only {len(shards)} nodes are connected: connect the others"
            )
        if len(set(shards)) < len(shards) or not set(shards) <= set(range(self._clients)):
            raise UserError(
                f"clients = {self._clients}, but the nodes hold the shards {shards}: give each node its own"
            )
        self._sort()

    def _sort(self) -> None:
        self.nodes = dict(sorted(self.nodes.items(), key=lambda node: node[1]))


def collect_states(grid: Grid, nodes: Nodes, rounds: list[int]) -> dict[int, ArrayRecord]:
    """The optimizer state of each worker after its round in `rounds`; of those that answer."""
    question = ConfigRecord({STATE_ROUNDS: rounds})
    replies = ask(grid, "query.state", {node: RecordDict({"config": question}) for node in nodes})
    return {
        nodes[node]: reply.content.array_records[STATE]
        for node, reply in replies.items()
        if reply.has_content() and STATE in reply.content.array_records
    }


def usable_states(
    records: Mapping[int, ArrayRecord], rounds: list[int], like: Mapping[str, Tensor]
) -> dict[int, dict[str, Tensor]]:
    """The states of those workers that sent one shaped as `like` and finite; after round 0 there is nothing in it."""
    states = {}
    for worker, record in records.items():
        with contextlib.suppress(ValueError):
            state = tensors_like(record, tensor_record(like if rounds[worker] else {}))
            if all(tensor.isfinite().all() for tensor in state.values()):
                states[worker] = state
    return states


def restore_states(grid: Grid, nodes: Nodes, rounds: list[int], states: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Hand each worker the state that it kept after its round in `rounds`, when the checkpoint was made."""
    question = ConfigRecord({STATE_ROUNDS: rounds})
    ask(
        grid,
        "query.state",
        {
            node: RecordDict({STATE: tensor_record(states[worker]), "config": question})
            for node, worker in nodes.items()
            if worker in states
        },
    )


def ask(grid: Grid, question: str, contents: Mapping[int, RecordDict]) -> dict[int, Message]:
    """The answers to a query with these contents, by node; without the nodes that take too long or are gone."""
    replies = exchange(grid, [Message(content, node, question) for node, content in contents.items()], ANSWER_SECONDS)
    # That a node is gone is said by the SuperLink, in its own name
    return {reply.metadata.src_node_id: reply for reply in replies if reply.metadata.src_node_id in contents}


def exchange(grid: Grid, messages: Sequence[Message], seconds: float = math.inf) -> list[Message]:
    """The replies to `messages` that come within so many seconds.

    `Grid.send_and_receive` does the same, but in a deployment it looks for replies every three seconds only.
    """
    deadline = time.monotonic() + seconds
    waiting = {id for id in grid.push_messages(messages) if id} if messages else set()
    replies: list[Message] = []
    while waiting:
        come = list(grid.pull_messages(waiting))
        replies += come
        waiting -= {reply.metadata.reply_to_message_id for reply in come}
        if time.monotonic() > deadline:
            break
        if waiting:
            time.sleep(LOOK_SECONDS)
    return replies
