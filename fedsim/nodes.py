"""The server's talk with its nodes: who is there, and what they keep between rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.errors import RunFailed, UserError
from strategies import tensor_record, tensors_of

JOIN_SECONDS = 60  # how long nodes that are known to exist may take to connect

Nodes = dict[int, int]  # Flower's (random) node id -> worker, its partition-id


def roll_call(grid: Grid, clients: int) -> Nodes:
    """The nodes by the shards that they hold, in the order of the shards.

    Every node tells the shard it holds and of how many; another number than `clients` fails at once. Nodes
    of a deployment may join up to a minute late.
    """
    nodes: Nodes = {}
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        for reply in ask(grid, "query.partition", [node for node in grid.get_node_ids() if node not in nodes]):
            held = reply.content.metric_records["partition"]
            if held["num-partitions"] != clients:
                number = held["num-partitions"]
                raise UserError(f"clients = {clients}, but the federation has {number} nodes: make them equal")
            nodes[reply.metadata.src_node_id] = int(held["partition-id"])  # type: ignore[arg-type]
        if len(nodes) >= clients:
            break
        if time.monotonic() > deadline:
            raise UserError(f"clients = {clients}, but only {len(nodes)} nodes are connected: connect the others")
        time.sleep(0.2)
    if sorted(nodes.values()) != list(range(clients)):
        shards = sorted(nodes.values())
        raise UserError(f"clients = {clients}, but the nodes hold the shards {shards}: give each node its own")
    return dict(sorted(nodes.items(), key=lambda node: node[1]))


def collect_states(grid: Grid, nodes: Nodes) -> dict[str, dict[str, Tensor]]:
    """The optimizer state that each worker keeps between rounds, for the checkpoint."""
    replies = ask(grid, "query.state", nodes)
    return {
        str(nodes[reply.metadata.src_node_id]): tensors_of(reply.content.array_records["optimizer"])
        for reply in replies
    }


def restore_states(grid: Grid, nodes: Nodes, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Hand each worker the state that it kept when the checkpoint was made."""
    by_node = {node: states[str(worker)] for node, worker in nodes.items() if str(worker) in states}
    ask(grid, "query.state", by_node, {node: {"optimizer": tensor_record(s)} for node, s in by_node.items()})


def ask(
    grid: Grid, question: str, nodes: Iterable[int], records: Mapping[int, Mapping[str, ArrayRecord]] | None = None
) -> list[Message]:
    """Every node's answer to a query; a node that cannot answer fails the run."""
    messages = [Message(RecordDict(dict((records or {}).get(node, {}))), node, question) for node in nodes]
    replies = list(grid.send_and_receive(messages)) if messages else []
    for reply in replies:
        if reply.has_error():
            raise RunFailed(f"a client cannot answer {question}: {reply.error.reason}")
    return replies


def payload(messages: Iterable[Message]) -> int:
    """The bytes of all arrays in `messages`, headers not counted."""
    return sum(
        np.dtype(array.dtype).itemsize * math.prod(array.shape)
        for message in messages
        if message.has_content()
        for record in message.content.array_records.values()
        for array in record.values()
    )
