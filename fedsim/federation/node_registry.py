"""Which node is which worker: asked of each node, since Flower's node ids are random."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedsim.config import Config
from fedsim.data.datasets import digests_of
from fedsim.data.local_folder import IMAGES, LABELS
from fedsim.errors import UserError
from fedsim.federation.flower_internals import CLIENT_FAILED
from fedsim.federation.messenger import ANSWER_SECONDS, POLL_SECONDS, Messenger
from fedsim.federation.protocol import shared
from fedsim.own_code import own_code
from fedsim.runs.inputs import check_own_data, differing
from fedsim.training.methods import mean_of
from strategies.screening import printable

SHA256_DIGITS = 64
JOIN_SECONDS = 120  # how long nodes may take to connect: a SuperLink takes a killed one for connected for a minute

Nodes = dict[int, int]  # node -> worker, its partition-id, in the order of the workers


@dataclass
class _Question:
    """A question to a node that has not answered yet."""

    ids: set[str | None]  # of its messages; None: the SuperLink did not accept it
    again_at: float  # when it is asked once more
    patience: float


class _Answer(NamedTuple):
    """What a node says of itself: the shard that it holds, and the images of its own, if it has any."""

    worker: int
    images: int  # 0: it was not asked
    own_data: dict[str, str]  # their digests


class NodeRegistry:
    """The nodes that take part, by the shard that each says it holds.

    A node that fails, says what cannot be, or has other data or code than the server is left out, with a line, and the
    others go on. A shard belongs to the first node that says it holds it, for as long as that one is connected: another
    that says so takes no part, and is handed no memory, until the first is gone. So a node that was ended and started
    again has its shard back once the SuperLink knows that it had ended. Whom the SuperLink takes for a node is its
    matter: with `deploy`, whoever has a registered key.

    All have the data set and the code of the server. A node may have images of its own instead: `own_data` holds their
    digests, by worker, and none for a worker that has the data set of the run. They stay the same for the whole run.
    Where clients weigh by their images, each says how many it has, once: `images`, by worker.
    New nodes are all asked at once. One that does not answer is asked again later, after twice as long each time; no
    round waits for it.
    """

    def __init__(self, messenger: Messenger, config: Config, own_data: dict[str, dict[str, str]] | None = None) -> None:
        self.nodes: Nodes = {}
        self._own_data = {} if own_data is None else own_data
        self._dataset = config.dataset
        self._data, self._code = digests_of(config), own_code(config, of_client=True)
        self.images: dict[int, int] = {}
        self._weighs_images = mean_of(config).by_shards
        self._messenger, self._clients = messenger, config.clients
        self._content = RecordDict({"config": ConfigRecord({**shared(config)})})
        self._questions: dict[int, _Question] = {}
        self._shards: Nodes = {}  # node -> the worker whose shard belongs to it, also while it is asked again
        self._holders: dict[int, int] = {}  # worker -> node, the inverse
        self._sizes: dict[int, int] = {}  # node -> of how many it says it is one
        self._refused: dict[int, str] = {}  # node -> why
        self._waiting: dict[int, _Answer] = {}  # nodes whose shard belongs to another

    def wait_for(self, least: int) -> None:
        """Ask every node which shard it holds, also those that are known: one may have been started again.

        Nodes may take two minutes to join; then `least` of them are enough. They are at once where no other can be
        expected. Raises UserError where fewer can take part, with the reason of each that cannot.
        """
        self.nodes, self._questions = {}, {}
        self._refused, self._waiting = {}, {}
        deadline = time.monotonic() + JOIN_SECONDS
        while True:
            connected = set(self._messenger.grid.get_node_ids())
            self._update(connected)
            if len(self.nodes) >= self._clients or self._is_complete(connected, time.monotonic() > deadline):
                break
            time.sleep(POLL_SECONDS)
        if len(self.nodes) < least:
            raise UserError(self._too_few(least))

    def refresh(self) -> Nodes:
        """The known nodes that are connected now. A new one takes the shard of one that is gone.

        New nodes are asked, and answers read that have come by now, without waiting for any.
        """
        connected = set(self._messenger.grid.get_node_ids())
        self._update(connected)
        return {node: worker for node, worker in self.nodes.items() if node in connected}

    def _update(self, connected: set[int]) -> None:
        """Ask nodes that are not known yet, read what has been answered, and give free shards to those that wait."""
        self._waiting = {node: answer for node, answer in self._waiting.items() if node in connected}
        self._refused = {node: reason for node, reason in self._refused.items() if node in connected}
        replies = self._answers(connected)
        for node in [*self._waiting, *replies]:
            try:
                answer = self._waiting.get(node) or self._answer_of(replies[node])
                self._take_in(node, answer, connected)
            except UserError as error:
                self._refuse(node, str(error))
        self.nodes = dict(sorted(self.nodes.items(), key=lambda item: item[1]))

    def _answers(self, connected: set[int]) -> dict[int, Message]:
        """Ask nodes that are not known yet, and read what has been answered, in the order of the nodes."""
        self._questions = {node: asked for node, asked in self._questions.items() if node in connected}
        now = time.monotonic()
        unknown = sorted(connected - self.nodes.keys() - self._refused.keys() - self._waiting.keys())
        due = [node for node in unknown if node not in self._questions or now >= self._questions[node].again_at]
        questions = [Message(self._content, node, "query.partition") for node in due]
        ids = self._messenger.grid.push_messages(questions) if due else ()
        for node, id_ in zip(due, ids, strict=True):
            earlier = self._questions.get(node, _Question(set(), 0, ANSWER_SECONDS / 2))
            patience = 2 * earlier.patience
            self._questions[node] = _Question(earlier.ids | {id_}, now + patience, patience)

        answers: dict[int, Message] = {}
        asked_by = {id_: node for node, asked in self._questions.items() for id_ in asked.ids if id_}
        for reply in self._messenger.receive(asked_by):
            node = asked_by[reply.metadata.reply_to_message_id]
            self._questions.pop(node, None)
            gone = reply.metadata.src_node_id != node  # the SuperLink says so, in its own name
            if not gone and (reply.has_content() or reply.error.code == CLIENT_FAILED):
                answers[node] = reply
        return dict(sorted(answers.items()))

    def _take_in(self, node: int, answer: _Answer, connected: set[int]) -> None:
        """Give a node the shard that it says it holds, or let it wait while that is another's that is connected."""
        holder = self._holders.get(answer.worker, node)
        if holder != node and holder in connected:
            if node not in self._waiting:
                _report(node, self._why_waiting(answer.worker))
            self._release(node)
            self._waiting[node] = answer
            return
        worker = str(answer.worker)
        check_own_data(worker, self._own_data.setdefault(worker, answer.own_data), answer.own_data)
        if self._weighs_images:  # last: a node that is refused changes no weight
            self.images[answer.worker] = answer.images
        for other in (node, holder):
            self._release(other)
        self._holders[answer.worker] = node
        self._shards[node] = self.nodes[node] = answer.worker

    def _refuse(self, node: int, reason: str) -> None:
        _report(node, reason)
        self._release(node)
        self._refused[node] = reason

    def _release(self, node: int) -> None:
        """The node holds no shard and waits for none."""
        if (worker := self._shards.pop(node, None)) is not None:
            del self._holders[worker]
        self.nodes.pop(node, None)
        self._waiting.pop(node, None)

    def _answer_of(self, reply: Message) -> _Answer:
        """What a reply says; raises UserError where its node cannot take part."""
        if reply.has_error():
            raise UserError(f"it cannot take part: {printable(reply.error.reason)}")
        held = reply.content.metric_records.get("partition", MetricRecord())
        if type(size := held.get("num-partitions")) is int and size > 0:
            self._sizes[reply.metadata.src_node_id] = size
        worker = self._worker_of(held)
        own_data = self._own_data_of(worker, reply.content)
        return _Answer(worker, self._images_of(held) if self._weighs_images else 0, own_data)

    def _worker_of(self, held: MetricRecord) -> int:
        worker, number = held.get("partition-id"), held.get("num-partitions")
        if number != self._clients:
            shown = printable(number)
            raise UserError(
                f"its federation has {shown} nodes, not clients = {self._clients}: make them equal, by -c clients=N, "
                f"or in a simulation by --federation-config num-supernodes={self._clients}"
            )
        if type(worker) is not int or not 0 <= worker < self._clients:
            last = self._clients - 1
            raise UserError(f"it holds shard {printable(worker)}: give it a partition-id from 0 to {last}")
        return worker

    def _images_of(self, held: MetricRecord) -> int:
        images = held.get("images")
        if type(images) is not int or images < 1:
            raise UserError(f"it holds {printable(images)} images: it must run the server's version of fedsim")
        return images

    def _own_data_of(self, worker: int, content: RecordDict) -> dict[str, str]:
        """The digests of a node's own images, if it has any; raises UserError where its data or code are others."""
        data, code = (dict(content.config_records.get(name, ConfigRecord())) for name in ("data", "code"))
        has_own = data.keys() == {IMAGES, LABELS}
        node = f"the node with partition-id {worker}"
        if not has_own and (other := differing(data, self._data)):
            raise UserError(
                f"{node} has other {printable(other)} of dataset = {self._dataset} than the server: give it the same; "
                "a function must draw with a seed"
            )
        if other := differing(code, self._code):
            raise UserError(f"{node} has another {printable(other)} than the server: give it the same code")
        return {name: str(value)[:SHA256_DIGITS] for name, value in data.items()} if has_own else {}

    def _is_complete(self, connected: set[int], late: bool) -> bool:
        """Whether `wait_for` need not wait: no other node is to be expected, or it is `late` and none may still answer.

        A federation has as many nodes as all of them say, if they are several, or else as there are clients.
        """
        if late:
            return not self._still_in_first_attempt()
        sizes = {self._sizes.get(node) for node in connected}
        agreed = sizes.pop() if len(sizes) == 1 and len(connected) > 1 else None
        expected = agreed or self._clients
        decided = self.nodes.keys() | self._refused.keys() | self._waiting.keys()
        return len(connected) >= expected and connected <= decided

    def _too_few(self, least: int) -> str:
        """The error of `wait_for`, with the reason of each node that is left out."""
        reasons = self._refused | {node: self._why_waiting(answer.worker) for node, answer in self._waiting.items()}
        if not reasons:
            return f"clients = {self._clients}, but only {len(self.nodes)} nodes are connected: connect the others"
        nodes_of: dict[str, list[int]] = {}
        for node, reason in reasons.items():
            nodes_of.setdefault(reason, []).append(node)
        left_out = "; ".join(f"{reason} (node {', '.join(map(str, nodes))})" for reason, nodes in nodes_of.items())
        return (
            f"clients = {self._clients}, but only {len(self.nodes)} nodes can take part, and {least} must. "
            f"Left out: {left_out}"
        )

    def _why_waiting(self, worker: int) -> str:
        return f"its partition-id {worker} is that of another node that is connected: give each node its own"

    def _still_in_first_attempt(self) -> bool:
        """Whether a node may still answer the first question that it was asked."""
        now = time.monotonic()
        return any(asked.patience == ANSWER_SECONDS and now < asked.again_at for asked in self._questions.values())


def _report(node: int, reason: str) -> None:
    print(f"node {node} is left out: {reason}", flush=True)
