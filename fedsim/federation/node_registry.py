"""Which node is which worker: asked of each node, since Flower's node ids are random."""

from __future__ import annotations

import time
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedsim.config import Config
from fedsim.data.datasets import digests_of
from fedsim.data.local_folder import IMAGES, LABELS
from fedsim.errors import UserError
from fedsim.federation.flower_internals import CLIENT_FAILED
from fedsim.federation.messenger import ANSWER_SECONDS, POLL_SECONDS, Messenger
from fedsim.federation.protocol import shared
from fedsim.inputs import check_own_data, differing
from fedsim.own_code import own_code
from strategies import printable

SHA256_DIGITS = 64
JOIN_SECONDS = 120  # how long nodes may take to connect: a SuperLink takes a killed one for connected for a minute

Nodes = dict[int, int]  # node -> worker, its partition-id, in the order of the workers


@dataclass
class _Question:
    """A question to a node that has not answered yet."""

    ids: set[str | None]  # of its messages; None: the SuperLink did not accept it
    again_at: float  # when it is asked once more
    patience: float


class NodeRegistry:
    """The nodes that take part, by the shard that each says it holds.

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
        self._weighs_images = config.client_weights == "shard-size"
        self._messenger, self._clients = messenger, config.clients
        self._content = RecordDict({"config": ConfigRecord({**shared(config)})})
        self._questions: dict[int, _Question] = {}
        self._rejected: set[int] = set()

    def wait_for(self, least: int, strict: bool = False) -> None:
        """Ask every node which shard it holds. Nodes may take two minutes to join; then `least` of them are enough.

        A node that cannot take part (its federation has another size, its own configuration is wrong, its shard is
        another node's) is rejected with a line, or, `strict`, raises UserError.
        """
        self.nodes, self._questions = {}, {}
        self._rejected.clear()
        deadline = time.monotonic() + JOIN_SECONDS
        while True:
            connected = set(self._messenger.grid.get_node_ids())
            found, rejected = self._identify(connected)
            if strict:
                self._check(found, rejected)
            self._take_in(found, rejected)
            if len(self.nodes) >= self._clients or (time.monotonic() > deadline and not self._still_in_first_attempt()):
                break
            time.sleep(POLL_SECONDS)
        if len(self.nodes) < least:
            raise UserError(
                f"clients = {self._clients}, but only {len(self.nodes)} nodes are connected: connect the others"
            )

    def refresh(self) -> Nodes:
        """The known nodes that are connected now. A new one that holds the shard of another replaces it.

        New nodes are asked, and answers read that have come by now, without waiting for any.
        """
        connected = set(self._messenger.grid.get_node_ids())
        self._take_in(*self._identify(connected))
        return {node: worker for node, worker in self.nodes.items() if node in connected}

    def _identify(self, connected: set[int]) -> tuple[Nodes, dict[int, str]]:
        """Ask nodes that are not known yet, and read what has been answered: the workers, and reasons to reject."""
        self._questions = {node: asked for node, asked in self._questions.items() if node in connected}
        now = time.monotonic()
        unknown = sorted(connected - self.nodes.keys() - self._rejected)
        due = [node for node in unknown if node not in self._questions or now >= self._questions[node].again_at]
        questions = [Message(self._content, node, "query.partition") for node in due]
        ids = self._messenger.grid.push_messages(questions) if due else ()
        for node, id_ in zip(due, ids, strict=True):
            earlier = self._questions.get(node, _Question(set(), 0, ANSWER_SECONDS / 2))
            patience = 2 * earlier.patience
            self._questions[node] = _Question(earlier.ids | {id_}, now + patience, patience)

        found: Nodes = {}
        rejected: dict[int, str] = {}
        waiting = {id_: node for node, asked in self._questions.items() for id_ in asked.ids if id_}
        for reply in self._messenger.receive(waiting):
            node = waiting[reply.metadata.reply_to_message_id]
            self._questions.pop(node, None)
            if reply.metadata.src_node_id != node:  # the SuperLink reports that the node is gone
                continue
            if not reply.has_error():
                try:
                    worker = self._worker_of(reply.content)
                    self._check_inputs(worker, reply.content)
                    if self._weighs_images:  # last: a node that is rejected changes no weight
                        self.images[worker] = self._images_of(reply.content)
                    found[node] = worker
                except UserError as error:
                    rejected[node] = str(error)
            elif reply.error.code == CLIENT_FAILED:
                rejected[node] = f"a node cannot take part: {printable(reply.error.reason)}"
        return dict(sorted(found.items())), rejected

    def _worker_of(self, content: RecordDict) -> int:
        held = content.metric_records.get("partition", MetricRecord())
        worker, number = held.get("partition-id"), held.get("num-partitions")
        if number != self._clients:
            shown = printable(number)
            raise UserError(
                f"clients = {self._clients}, but the federation has {shown} nodes: make them equal, by "
                f"-c clients=N, or in a simulation by --federation-config num-supernodes={self._clients}"
            )
        if type(worker) is not int or not 0 <= worker < self._clients:
            last = self._clients - 1
            raise UserError(f"a node holds shard {printable(worker)}: give it a partition-id from 0 to {last}")
        return worker

    def _images_of(self, content: RecordDict) -> int:
        images = content.metric_records["partition"].get("images")
        if type(images) is not int or images < 1:
            raise UserError(f"a node holds {printable(images)} images: it must run the server's version of fedsim")
        return images

    def _check_inputs(self, worker: int, content: RecordDict) -> None:
        """Raise UserError where a node has other data or code than the server, or other images than before."""
        data, code = (dict(content.config_records.get(name, ConfigRecord())) for name in ("data", "code"))
        has_own = data.keys() == {IMAGES, LABELS}
        own = {name: str(value)[:SHA256_DIGITS] for name, value in data.items()} if has_own else {}
        node = f"the node with partition-id {worker}"
        if not has_own and (other := differing(data, self._data)):
            raise UserError(
                f"{node} has other {printable(other)} of dataset = {self._dataset} than the server: give it the same; "
                "a function must draw with a seed"
            )
        if other := differing(code, self._code):
            raise UserError(f"{node} has another {printable(other)} than the server: give it the same code")
        check_own_data(str(worker), self._own_data.setdefault(str(worker), own), own)

    def _check(self, found: Nodes, rejected: dict[int, str]) -> None:
        for reason in rejected.values():
            raise UserError(reason)
        shards = sorted([*self.nodes.values(), *found.values()])
        if len(set(shards)) < len(shards):
            raise UserError(
                f"clients = {self._clients}, but the nodes hold the shards {shards}: give each node its own"
            )

    def _take_in(self, found: Nodes, rejected: dict[int, str]) -> None:
        for node, reason in rejected.items():
            self._rejected.add(node)
            print(f"a node that has connected is left out: {reason}", flush=True)
        for node, worker in found.items():
            self.nodes = {other: held for other, held in self.nodes.items() if held != worker} | {node: worker}
        self.nodes = dict(sorted(self.nodes.items(), key=lambda item: item[1]))

    def _still_in_first_attempt(self) -> bool:
        """Whether a node may still answer the first question that it was asked."""
        now = time.monotonic()
        return any(asked.patience == ANSWER_SECONDS and now < asked.again_at for asked in self._questions.values())
