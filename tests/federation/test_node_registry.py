"""Which node is which worker: nodes that join late, say nonsense or nothing at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedsim.config import Config, own_keys
from fedsim.data.datasets import digests_of
from fedsim.errors import UserError
from fedsim.federation import client_app, node_registry
from fedsim.federation.in_process import SERVER_ID, InProcessGrid
from fedsim.federation.messenger import Messenger
from fedsim.federation.node_registry import NodeRegistry


class Network(InProcessGrid):
    """Nodes 2 to 5 hold the shards 0 to 3. Others join with an answer of their own, or never answer."""

    def __init__(self, config: Config) -> None:
        app = ClientApp()
        app.query("partition")(self.partition)
        super().__init__(app, config)
        self.answers: dict[int, MetricRecord] = {}
        self.data = {"data": ConfigRecord({**digests_of(config)}), "code": ConfigRecord()}  # in those answers
        self.silent: set[int] = set()
        self.failing: set[int] = set()
        self.gone: set[int] = set()
        self.slow: set[int] = set()  # what they reply is on its way
        self.asked: Counter[int] = Counter()

    def partition(self, message: Message, context: Context) -> Message:
        if context.node_id in self.failing:
            raise OSError("no space left on device")
        if context.node_id in self.answers:
            return Message(RecordDict({"partition": self.answers[context.node_id], **self.data}), reply_to=message)
        return client_app.partition(message, context)

    def join(self, node: int, silent: bool = False, **answer: Any) -> None:
        self._contexts[node] = Context(1, node, {}, RecordDict(), {})
        self.answers[node] = MetricRecord({name.replace("_", "-"): value for name, value in answer.items()})
        self.silent |= {node} if silent else set()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        self.asked.update(message.metadata.dst_node_id for message in messages)
        ids = list(super().push_messages(messages))
        for id_, message in zip(ids, messages, strict=True):
            if message.metadata.dst_node_id in self.gone:
                self._replies[id_] = Message(Error(5, "Node Unavailable"), reply_to=message)
                self._replies[id_].metadata.__dict__["_src_node_id"] = SERVER_ID
            if message.metadata.dst_node_id in self.silent:
                del self._replies[id_]
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        slow = {id_ for id_, reply in self._replies.items() if reply.metadata.src_node_id in self.slow}
        return list(super().pull_messages(set(message_ids) - slow))


@pytest.fixture
def network(small: Config) -> Iterator[Network]:
    network = Network(small)
    with network:
        yield network


@pytest.fixture
def registry(network: Network, small: Config) -> NodeRegistry:
    registry = NodeRegistry(Messenger(network), small)
    registry.wait_for(4)
    return registry


@pytest.fixture
def weighted(network: Network, small: Config) -> NodeRegistry:
    """The registry of a run whose mean counts images; each node has as many as its id says."""
    registry = NodeRegistry(Messenger(network), small.changed({"mean.weights": "shard-size"}))
    for node in range(2, 6):
        network.join(node, partition_id=node - 2, num_partitions=4, images=node)
    registry.wait_for(4)
    return registry


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The registry's time, which passes when a test or its waiting says so."""
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(node_registry, "time", clock)
    return clock


@pytest.fixture
def late(network: Network, clock: SimpleNamespace) -> list[Context]:
    """The nodes in it join one after the other, a minute after the start."""
    late: list[Context] = []

    def sleep(seconds: float) -> None:
        clock.now += seconds
        if late and clock.now > 1060:
            context = late.pop()
            network._contexts[context.node_id] = context

    clock.sleep = sleep
    return late


@pytest.mark.parametrize("partition_id", [99, -1, 4, 2**62, 1.0, [1]])
def test_a_late_node_with_no_shard_of_the_run_is_rejected_with_a_line(
    network: Network, registry: NodeRegistry, capsys: pytest.CaptureFixture[str], partition_id: Any
) -> None:
    network.join(50, partition_id=partition_id, num_partitions=4)
    assert registry.refresh() == registry.refresh() == {2: 0, 3: 1, 4: 2, 5: 3}
    line = f"node 50 is left out: it holds shard {partition_id}: give it a partition-id from 0 to 3"
    assert capsys.readouterr().out == f"{line}\n"
    assert network.asked[50] == 1


def test_a_node_that_replaces_another_takes_its_shard(network: Network, registry: NodeRegistry) -> None:
    network.join(50, partition_id=1, num_partitions=4)
    del network._contexts[3]
    assert registry.refresh() == {2: 0, 50: 1, 4: 2, 5: 3}


SAME_SHARD = "its partition-id 1 is that of another node that is connected: give each node its own"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "federation": (
        {"partition_id": 3, "num_partitions": 7},
        "its federation has 7 nodes, not clients = 4: make them equal, by -c clients=N, or in a simulation by "
        "--federation-config num-supernodes=4",
    ),
    "range": (
        {"partition_id": 4, "num_partitions": 4},
        "it holds shard 4: give it a partition-id from 0 to 3",
    ),
    "number": (
        {"partition_id": 3.0, "num_partitions": 4},
        "it holds shard 3.0: give it a partition-id from 0 to 3",
    ),
    "taken": ({"partition_id": 1, "num_partitions": 4}, SAME_SHARD),
    "nothing": (
        {},
        "its federation has None nodes, not clients = 4: make them equal, by -c clients=N, or in a simulation by "
        "--federation-config num-supernodes=4",
    ),
    "raises": ({}, "it cannot take part: OSError: no space left on device"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_node_is_left_out_alone_and_the_others_begin_at_once(
    network: Network, small: Config, clock: SimpleNamespace, capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    """In the place of the fourth, or as a fifth; where four are needed, the error gives its reason."""
    answer, reason = BAD[bad]
    fourth = network._contexts.pop(5)
    network.join(50, **answer)
    network.failing = {50} if bad == "raises" else set()
    registry = NodeRegistry(Messenger(network), small)
    registry.wait_for(3)
    assert registry.refresh() == registry.nodes == {2: 0, 3: 1, 4: 2}
    assert capsys.readouterr().out.splitlines()[-1:] == [f"node 50 is left out: {reason}"]
    with pytest.raises(UserError) as caught:
        registry.wait_for(4)
    assert str(caught.value) == (
        f"clients = 4, but only 3 nodes can take part, and 4 must. Left out: {reason} (node 50)"
    )
    network._contexts[5] = fourth
    registry.wait_for(4)
    assert registry.refresh() == {2: 0, 3: 1, 4: 2, 5: 3}
    assert clock.now == 1000


def test_a_node_that_was_left_out_is_asked_again_when_it_is_back(network: Network, registry: NodeRegistry) -> None:
    del network._contexts[3]
    network.join(50, partition_id=7, num_partitions=4)
    assert registry.refresh() == {2: 0, 4: 2, 5: 3}
    put_right = network._contexts.pop(50)
    registry.refresh()
    network._contexts[50] = put_right
    network.answers[50]["partition-id"] = 1
    assert registry.refresh() == {2: 0, 50: 1, 4: 2, 5: 3}


def test_others_that_may_still_join_are_waited_for(
    network: Network, small: Config, clock: SimpleNamespace, late: list[Context]
) -> None:
    late += [network._contexts.pop(node) for node in (3, 4, 5)]
    network.join(50, partition_id=4, num_partitions=4)
    registry = NodeRegistry(Messenger(network), small)
    registry.wait_for(3)
    assert registry.nodes == {2: 0, 4: 2, 5: 3}
    assert clock.now < 1062


@pytest.mark.parametrize("others", [3, 1])
def test_a_lone_node_that_says_there_is_no_other_is_refused_alone(
    network: Network,
    small: Config,
    clock: SimpleNamespace,
    late: list[Context],
    capsys: pytest.CaptureFixture[str],
    others: int,
) -> None:
    """The others still have their time to join; where too few do, its reason is in the error."""
    late += [network._contexts.pop(node) for node in (2, 3, 4, 5)][:others]
    network.join(50, partition_id=0, num_partitions=1)
    registry = NodeRegistry(Messenger(network), small)
    reason = (
        "its federation has 1 nodes, not clients = 4: make them equal, by -c clients=N, or in a simulation by "
        "--federation-config num-supernodes=4"
    )
    if others == 3:
        registry.wait_for(3)
        assert registry.nodes == {2: 0, 3: 1, 4: 2}
        assert clock.now < 1062
    else:
        with pytest.raises(UserError) as caught:
            registry.wait_for(3)
        assert str(caught.value) == (
            f"clients = 4, but only 1 nodes can take part, and 3 must. Left out: {reason} (node 50)"
        )
    assert capsys.readouterr().out == f"node 50 is left out: {reason}\n"


def test_the_reason_of_each_is_in_the_error_once(network: Network, small: Config, clock: SimpleNamespace) -> None:
    """At once where no other node can be expected: all say the same number, and are as many."""
    network._contexts.clear()
    network.join(50, partition_id=0, num_partitions=3)
    network.join(51, partition_id=1, num_partitions=3)
    network.join(52, partition_id=9, num_partitions=4)
    message = (
        "clients = 4, but only 0 nodes can take part, and 1 must. Left out: its federation has 3 nodes, "
        "not clients = 4: make them equal, by -c clients=N, or in a simulation by --federation-config num-supernodes=4 "
        "(node 50, 51); it holds shard 9: give it a partition-id from 0 to 3 (node 52)"
    )
    with pytest.raises(UserError) as caught:
        NodeRegistry(Messenger(network), small).wait_for(1)
    assert str(caught.value) == message
    assert 120 <= clock.now - 1000 < 121
    network.join(52, partition_id=9, num_partitions=3)
    began = clock.now
    with pytest.raises(
        UserError, match=r"Left out: its federation has 3 nodes, not clients = 4: .* \(node 50, 51, 52\)$"
    ):
        NodeRegistry(Messenger(network), small).wait_for(1)
    assert clock.now == began


def test_a_shard_belongs_to_its_node_until_that_one_is_gone(
    network: Network, registry: NodeRegistry, clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever is asked again, or answers first; then it has whoever has waited, and the first one waits."""
    everyone = {2: 0, 3: 1, 4: 2, 5: 3}
    network.join(1, partition_id=1, num_partitions=4)  # the first in order
    assert registry.refresh() == registry.refresh() == everyone
    assert capsys.readouterr().out == f"node 1 is left out: {SAME_SHARD}\n"
    network.silent = {3}  # the claim of 1 comes first
    registry.wait_for(3)
    assert registry.refresh() == {2: 0, 4: 2, 5: 3}
    network.silent = set()
    clock.now += 500
    assert registry.refresh() == everyone
    capsys.readouterr()
    holder = network._contexts.pop(3)
    assert registry.refresh() == {2: 0, 1: 1, 4: 2, 5: 3}
    network._contexts[3] = holder
    assert registry.refresh() == {2: 0, 1: 1, 4: 2, 5: 3}
    assert capsys.readouterr().out == f"node 3 is left out: {SAME_SHARD}\n"


def test_a_node_that_is_started_again_with_another_shard_leaves_the_first(
    network: Network, registry: NodeRegistry
) -> None:
    network.join(3, partition_id=9, num_partitions=4)
    network.join(50, partition_id=1, num_partitions=4)
    registry.wait_for(4)
    assert registry.refresh() == {2: 0, 50: 1, 4: 2, 5: 3}


def test_a_node_that_waits_for_a_shard_changes_nobodys_weight(network: Network, weighted: NodeRegistry) -> None:
    network.join(9, partition_id=1, num_partitions=4, images=500)
    weighted.refresh()
    assert weighted.images == {0: 2, 1: 3, 2: 4, 3: 5}
    del network._contexts[3]
    weighted.refresh()
    assert weighted.images == {0: 2, 1: 500, 2: 4, 3: 5}


OTHER_DATA = [
    (
        {"data": {"train_labels": "0" * 64}},
        "the node with partition-id 1 has other train_labels of dataset = synthetic:images=128 than the server: give "
        "it the same; a function must draw with a seed",
    ),
    (
        {"code": {"net.py": "0" * 64}},
        "the node with partition-id 1 has another net.py than the server: give it the same",
    ),
    (
        {"data": {"images.npy": "0" * 64, "labels.npy": "1" * 64}},
        "the images.npy, labels.npy of the node with partition-id 1 have changed since the run began: restore them, or",
    ),
]


@pytest.mark.parametrize(("other", "words"), OTHER_DATA)
def test_a_node_with_other_data_or_code_is_refused(
    network: Network,
    registry: NodeRegistry,
    small: Config,
    capsys: pytest.CaptureFixture[str],
    other: dict[str, dict[str, str]],
    words: str,
) -> None:
    """Late ones with a line; at the start of a run, images of its own alone are no error."""
    of_run = dict(network.data["data"])
    ((name, changes),) = other.items()
    replaces = "images.npy" in changes
    network.data[name] = ConfigRecord({**({} if replaces or name == "code" else of_run), **changes})
    network.join(50, partition_id=1, num_partitions=4)
    del network._contexts[3]
    assert registry.refresh() == {2: 0, 4: 2, 5: 3}
    assert capsys.readouterr().out.startswith(f"node 50 is left out: {words}")
    own: dict[str, dict[str, str]] = {}
    another_run = NodeRegistry(Messenger(network), small, own)
    if replaces:
        another_run.wait_for(4)
        assert own == {"0": {}, "1": changes, "2": {}, "3": {}}
    else:
        with pytest.raises(UserError, match=words):
            another_run.wait_for(4)


def test_a_node_that_is_refused_changes_nobodys_weight(network: Network, weighted: NodeRegistry) -> None:
    network.data = {"data": ConfigRecord({"images.npy": "0" * 64, "labels.npy": "1" * 64})}
    network.join(9, partition_id=1, num_partitions=4, images=500)
    assert 9 not in weighted.refresh()
    assert weighted.images == {0: 2, 1: 3, 2: 4, 3: 5}


def test_nodes_that_never_answer_hold_up_nothing_and_are_asked_ever_more_seldom(
    network: Network, registry: NodeRegistry, clock: SimpleNamespace
) -> None:
    network.join(50, silent=True)
    network.join(51, silent=True)
    asked = []
    for _ in range(15):
        began = clock.now
        assert len(registry.refresh()) == 4
        assert clock.now == began
        asked.append(network.asked[50])
        assert network.asked[51] == network.asked[50]
        clock.now += 60
    assert asked == [1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4]


def test_a_node_that_answers_late_takes_part_from_then_on(network: Network, registry: NodeRegistry) -> None:
    network.join(50, partition_id=1, num_partitions=4)
    network.slow = {50}
    del network._contexts[3]
    assert registry.refresh() == {2: 0, 4: 2, 5: 3}
    network.slow = set()
    assert registry.refresh() == {2: 0, 50: 1, 4: 2, 5: 3}
    assert network.asked[50] == 1


def test_a_node_that_the_superlink_reports_gone_is_asked_again_when_it_is_back(
    network: Network, registry: NodeRegistry
) -> None:
    network.join(50, partition_id=1, num_partitions=4)
    del network._contexts[3]
    network.gone = {50}
    assert registry.refresh() == {2: 0, 4: 2, 5: 3}
    network.gone = set()
    assert registry.refresh() == {2: 0, 50: 1, 4: 2, 5: 3}


def test_a_run_begins_without_those_that_never_answer_once_their_time_is_up(
    network: Network, small: Config, clock: SimpleNamespace
) -> None:
    network.silent = {3, 4}
    registry = NodeRegistry(Messenger(network), small)
    registry.wait_for(2)
    assert registry.refresh() == {2: 0, 5: 3}
    assert 120 <= clock.now - 1000 < 125  # not twice as long for two
    with pytest.raises(UserError, match="clients = 4, but only 2 nodes are connected: connect the others"):
        registry.wait_for(3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("partition_id", "partition_id cannot stand in the node config: did you mean partition-id?"),
        ("num_partitions", "num_partitions cannot stand in the node config: did you mean num-partitions?"),
        ("partition-ids", "partition-ids cannot stand in the node config: did you mean partition-id?"),
    ],
)
def test_misspelt_keys_of_flowers_in_the_node_config_are_named(name: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        own_keys({"num-partitions": 4, name: 1})
    assert str(caught.value) == words


@pytest.mark.parametrize("value", [None, 1.5, "0", True])
def test_a_node_whose_shard_is_no_whole_number_cannot_take_part(network: Network, small: Config, value: Any) -> None:
    node_config = network._contexts[4].node_config
    node_config.pop("partition-id")
    if value is not None:
        node_config["partition-id"] = value
    with pytest.raises(UserError, match=f"cannot take part: .*partition-id = {value} in the node config: give a whole"):
        NodeRegistry(Messenger(network), small).wait_for(4)
