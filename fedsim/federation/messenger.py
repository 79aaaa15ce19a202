"""Messages to clients and their replies, over any Flower grid, and the bytes of the arrays in both."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedsim.errors import RunFailed
from fedsim.federation.flower_internals import CLIENT_FAILED, actor_died, simulates
from fedsim.training.failures import OUT_OF_MEMORY
from strategies.screening import printable
from strategies.tensor_array import payload_bytes

ANSWER_SECONDS = 120  # how long a node may take to answer a question; Flower starts a process for it
POLL_SECONDS = 0.1  # between polls for replies


class Messenger:
    """Sends and receives over `grid`. `bytes_up` and `bytes_down` count every array of the run, averaged or not.

    A reply that comes too late is fetched at a later exchange, counted and dropped.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.bytes_up = 0
        self.bytes_down = 0
        self._unanswered: set[str] = set()  # ids of messages that were not waited for any longer

    def receive(self, ids: Iterable[str]) -> list[Message]:
        """The replies that have come by now to the messages with these ids.

        Raises RunFailed where a client of a simulation lacks memory, or its Ray actor died.
        """
        wanted = set(ids)
        replies = list(self.grid.pull_messages(wanted)) if wanted else []
        for reply in replies if simulates(self.grid) else ():
            if lacks_memory(reply):
                raise RunFailed(reply.error.reason)
            if reply.has_error() and actor_died(reply):
                raise RunFailed(
                    f"a Ray actor, which trains clients, has died ({printable(reply.error.reason)}); is there enough "
                    "memory? The same command resumes the run from its checkpoint"
                )
        self.bytes_up += sum(map(payload, replies))
        return replies

    def exchange(self, messages: Sequence[Message], seconds: float = math.inf) -> list[Message]:
        """The replies to `messages` that come within so many seconds.

        `Grid.send_and_receive` does the same, but in a deployment it looks for replies every three seconds only.
        """
        deadline = time.monotonic() + seconds
        self.bytes_down += sum(map(payload, messages))
        waiting = set(filter(None, self.grid.push_messages(messages))) if messages else set()
        replies: list[Message] = []
        while waiting:
            arrived = self.receive(waiting)
            replies += arrived
            waiting -= _answered(arrived)
            if time.monotonic() > deadline:
                break
            if waiting:
                time.sleep(POLL_SECONDS)
        self._unanswered -= _answered(self.receive(self._unanswered))
        self._unanswered |= waiting
        return replies

    def ask(self, question: str, contents: Mapping[int, RecordDict]) -> dict[int, Message]:
        """The answers to a query, by node, without those of nodes that take too long or are gone."""
        replies = self.exchange(
            [Message(content, node, question) for node, content in contents.items()], ANSWER_SECONDS
        )
        # That a node is gone is reported by the SuperLink, in its own name
        return {reply.metadata.src_node_id: reply for reply in replies if reply.metadata.src_node_id in contents}


def lacks_memory(reply: Message) -> bool:
    """Whether `reply` is the error of a client that has too little memory."""
    failed = reply.has_error() and reply.error.code == CLIENT_FAILED
    return failed and (reply.error.reason or "").startswith(OUT_OF_MEMORY)


def payload(message: Message) -> int:
    """The bytes of all arrays in a message."""
    return sum(map(payload_bytes, message.content.array_records.values())) if message.has_content() else 0


def _answered(replies: Iterable[Message]) -> set[str]:
    return {reply.metadata.reply_to_message_id for reply in replies}
