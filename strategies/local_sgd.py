"""LocalSGD (Stich 2019, "Local SGD Converges Fast and Communicates Little"): average what every worker sends.

A round is: sample workers, screen their updates, take the weighted mean, take the server step. The mean is FedAvg's,
made exact and repeatable: it is summed in float64 and in the order of the worker numbers, not in that of the replies,
so that the mean of K identical workers is exactly each of them, for every K.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from strategies.averaging import Sent, send, update
from strategies.batchnorm import Statistics
from strategies.domain import NOT_NEGATIVE, Domain
from strategies.drift import drift
from strategies.layers import Layers
from strategies.mean import Exact, Mean
from strategies.method import ServerRound, State, Tensors, Update
from strategies.mixing import TOPOLOGY, OwnModels, as_state, consensus_distance, mix, models_of, send_own
from strategies.screening import Rules, Screened, screen, wrong_values
from strategies.sections import BUFFERS, EXTRAS, Sections, beside, join, split, under_prefix
from strategies.tensor_array import tensor_record, tensors_of
from strategies.topology import Row
from strategies.wire import WIRE, decode, why_undecodable

OF_HOLDERS = "of-holders"  # key of a message's config: true where it is for a worker that holds the last parameters
log = logging.getLogger(__name__)


class Request(NamedTuple):
    """The messages to the workers of a round.

    Where these have models of their `own`, `sent` has the mean of all models.
    """

    messages: list[Message]
    workers: dict[int, int]  # node -> worker, of all messages
    away: list[int]  # sampled workers whose node is not connected
    sent: Sent
    own: OwnModels | None = None


class Aggregate(NamedTuple):
    """The outcome of a round; `arrays` is None where too few updates were usable."""

    arrays: ArrayRecord | None
    metrics: MetricRecord
    state: State
    averaged: dict[int, MetricRecord]  # worker -> what it reported
    left_out: dict[int, str]  # the other sampled workers -> reason


@dataclass(frozen=True)
class Usable:
    """Which updates may be averaged, and how many a round needs: with fewer than `least` it has no average.

    A usable one weighs what `examples(round, worker)` allows and reports each of `metrics`, a value in its domain; the
    values of its arrays are in their `domains(round)` (see `strategies.screening.Rules`); `other_records` may come with
    it. A worker that is `away(round, worker)` is not asked for one, unless too few others are left.
    """

    least: int = 1
    examples: Callable[[int, int], Domain] = lambda round_, worker: NOT_NEGATIVE
    metrics: Mapping[str, Domain] = field(default_factory=dict)
    domains: Callable[[int], Mapping[str, Domain]] = lambda round_: {}
    other_records: Sequence[str] = ()
    away: Callable[[int, int], bool] | None = None  # None: all are there in every round


@dataclass(frozen=True)
class Seen:
    """What is seen of the workers: the `mean` of what these send, and the learning rates.

    `batchnorm` names the buffers of BatchNorm layers (see `batchnorm_buffers`), and `lr(round)` is the workers'
    learning rate at the end of a round. `drift(round)`: whether its metrics tell the drift of the updates. Where
    workers have models of their own, `rows(round)` says who averages whom (see `strategies.topology`).
    """

    mean: Mean = field(default_factory=Exact)
    batchnorm: Mapping[str, str] = field(default_factory=dict)
    lr: Callable[[int], float] = lambda round_: 1.0
    drift: Callable[[int], bool] = lambda round_: False
    rows: Callable[[int], Sequence[Row]] | None = None  # None: all have one model


class LocalSGD(FedAvg):
    """Average the arrays of all workers, weighted by ``num-examples``.

    `workers` maps node ids to worker numbers (Flower's node ids are random): these nodes may be sampled, and are summed
    in the order of their numbers. Without it every connected node may be, in the order of node ids. In each round
    `fraction_train` of them are sampled, by `seed` and the round: the same workers in every run. `population` is the
    number of workers that are sampled from, including those whose node is not connected (default: as many as
    `workers`).

    The updates that are `usable` are averaged. `layers` are the methods of the run, and `seen` is what they see of the
    workers. Other arguments are FedAvg's.
    """

    def __init__(
        self,
        workers: Mapping[int, int] | None = None,
        seed: int = 0,
        population: int = 0,
        usable: Usable | None = None,
        layers: Layers | None = None,
        seen: Seen | None = None,
        **fedavg: Any,
    ) -> None:
        super().__init__(**fedavg)
        self.workers = dict(workers or {})
        self.seed = seed
        self.population = population
        self.usable = usable or Usable()
        self.layers = layers or Layers()
        self.seen = seen or Seen()
        statistics = self.layers.statistics() or Statistics.statistics
        of_buffers = {BUFFERS + name: statistics[entry] for name, entry in self.seen.batchnorm.items()}
        self.rules = Rules(
            self.arrayrecord_key,
            self.weighted_by_key,
            metrics=self.usable.metrics,
            domains=of_buffers,
            other_records=self.usable.other_records,
        )

    def request(
        self,
        round_: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        nodes: Mapping[int, int],
        state: State | None = None,
        holders: Collection[int] = (),
    ) -> Request:
        """The train messages of a round, in the order of the workers: `arrays` for each sampled one of `nodes`.

        Where the server sends a part of the parameters, or encodes them, `holders` are the workers that hold those that
        the last round began from, which are in the server's `state`: they are sent this part or the encoded change, all
        others the parameters after it.
        """
        node_of = {worker: node for node, worker in nodes.items()}
        everyone = list(range(self.population)) or sorted(self.workers.values()) or sorted(node_of)
        sampled = self.sample(round_, everyone)
        workers = {node_of[worker]: worker for worker in sampled if worker in node_of}
        away = [worker for worker in sampled if worker not in node_of]
        config["server-round"] = round_
        x, buffers, _ = split(tensors_of(arrays))
        own = self._own(round_, Sections(x, buffers, {}), state or {}, workers.values())
        sent = send(self.layers, self._round(round_, x), buffers, state or {}, () if own else workers.values())
        if own:
            sent = sent._replace(layers={worker: of_worker.layers[worker] for worker, of_worker in own.sent.items()})
        of_workers = own.sent if own else dict.fromkeys(workers.values(), sent)
        return Request(self._messages(of_workers, config, workers, holders), workers, away, sent, own)

    def _own(self, round_: int, x: Sections, state: State, workers: Collection[int]) -> OwnModels | None:
        """The models of workers that have their own, and what is sent to `workers`; None where all have one."""
        if self.seen.rows is None:
            return None
        rows = self.seen.rows(round_)
        models = models_of(state, x.parameters, x.buffers, len(rows))
        return send_own(self.layers, functools.partial(self._round, round_), models, rows, workers)

    def _messages(
        self, sent: Mapping[int, Sent], config: ConfigRecord, workers: Mapping[int, int], holders: Collection[int]
    ) -> list[Message]:
        """A message to each node of `workers`; those that are sent the same tensors share their content."""
        of_holders = ConfigRecord({**config, OF_HOLDERS: True})
        contents: dict[tuple[int, bool, tuple[int, ...]], RecordDict] = {}
        messages = []
        for node, worker in workers.items():
            own = sent[worker]
            besides, change = own.layers[worker], own.change if worker in holders else None
            key = id(own), change is None, tuple(map(id, besides.values()))
            if key not in contents:
                arrays = Sections(own.begun if change is None else change, own.model.buffers, besides)
                contents[key] = self._content(arrays, config if change is None else of_holders)
            messages.append(Message(contents[key], node, MessageType.TRAIN))
        return messages

    def _content(self, arrays: Sections, config: ConfigRecord) -> RecordDict:
        return RecordDict({self.arrayrecord_key: tensor_record(join(arrays)), self.configrecord_key: config})

    def _round(self, round_: int, x: Tensors) -> ServerRound:
        sampled = self.fraction_train < 1 and not self._sample_size(self.population) == self.population > 0
        everyone = not sampled and self.usable.away is None
        return ServerRound(round_, everyone, x, x, self.seen.lr(round_), self.seen.batchnorm)

    def _sample_size(self, workers: int) -> int:
        return max(1, round(self.fraction_train * workers))

    def sample(self, round_: int, everyone: list[int]) -> list[int]:
        """The workers of a round: the nearest whole number to `fraction_train` of `everyone`, at least one.

        They are drawn from all workers, connected or not, so that a lost connection does not change who else is drawn.
        Of those drawn, the ones that are away are left out; where too few are left, the first of these come after all.
        """
        drawn = everyone
        if self.fraction_train < 1:
            size = self._sample_size(len(everyone))
            drawn = sorted(random.Random(f"{self.seed}/{round_}").sample(everyone, size))
        away = [worker for worker in drawn if self.usable.away and self.usable.away(round_, worker)]
        missing = set(away[max(0, self.usable.least - len(drawn) + len(away)) :])
        return [worker for worker in drawn if worker not in missing]

    def aggregate(self, round_: int, request: Request, replies: Iterable[Message], state: State) -> Aggregate:
        """The global arrays after a round, and the state of the layers after it.

        Raises FloatingPointError where these are not finite, or outside their domains: no further round can then be
        trained.
        """
        domains = {**self.rules.domains, **self.usable.domains(round_)}
        screened, left_out = self._screened(round_, request, replies, domains, state)
        for worker, reason in left_out.items():
            log.warning("round %s: worker %s is left out of the average: %s", round_, worker, reason)
        if len(screened) < self.usable.least:
            return Aggregate(None, MetricRecord(), state, {}, left_out)

        averaged = sorted(screened)
        used = [screened[worker] for worker in averaged]
        samples = math.fsum(each.weight for each in used)
        weights = [each.weight / samples for each in used]
        updates = dict(zip(averaged, map(self._update, used), strict=True))
        sent = _beside(used[0].arrays, request.sent)
        r = dataclasses.replace(
            self._round(round_, sent.model.parameters),
            begun=sent.begun,
            updates=updates,
            encoded=self.layers.wire.up is not None,
            weights=weights,
            share=len(averaged) / (self.population or len(self.workers) or len(averaged)),
        )
        models = mix(self.layers, self.seen.mean, r, request.own) if request.own else None
        if models:
            state = {**state, TOPOLOGY: as_state(models)}
        else:
            state = update(self.layers, self.seen.mean, r, sent, state) | ({WIRE: sent.wire} if sent.wire else {})
        arrays = join(Sections(r.next_x, r.buffers, {}))

        remembered = {
            f"{EXTRAS}{name}/{key}": v for name, of in state.items() for key, v in of.items() if isinstance(v, Tensor)
        }
        for what, wrong in zip(("average", "server's state"), wrong_values([arrays, remembered], domains), strict=True):
            if wrong:
                raise FloatingPointError(f"round {round_}: the {what} of {wrong.removeprefix(EXTRAS)}")
        metrics = mean_metrics(used, weights, self.weighted_by_key)
        if self.seen.drift(round_):
            metrics.update(drift(r) | (consensus_distance(models, r.next_x) if models else {}))
        return Aggregate(tensor_record(arrays), metrics, state, {k: screened[k].metrics for k in averaged}, left_out)

    def _screened(
        self, round_: int, request: Request, replies: Iterable[Message], domains: Mapping[str, Domain], state: State
    ) -> tuple[dict[int, Screened], dict[int, str]]:
        """The usable updates, decoded, and why each other sampled worker has none."""
        sent = request.sent
        examples = functools.partial(self.usable.examples, round_)
        rules = dataclasses.replace(self.rules, examples=examples, domains=domains)
        updates, left_out = screen(replies, request.messages, request.workers, self._like(round_, sent, state), rules)
        left_out |= dict.fromkeys(request.away, "its node is not connected")
        if self.layers.wire.up:
            updates, undecodable = self._decoded(self.layers.up(round_, sent.begun), updates, round_)
            left_out |= undecodable
        return updates, dict(sorted(left_out.items()))

    def _like(self, round_: int, sent: Sent, state: State) -> dict[int, ArrayRecord]:
        """Arrays with the names, types and shapes that each worker's update must have."""
        model = self.layers.wire.expected(self.layers.up(round_, sent.begun))
        records: dict[tuple[int, ...], ArrayRecord] = {}
        like = {}
        for worker, besides in sent.layers.items():
            key = tuple(map(id, besides.values()))
            if key not in records:
                replies = self.layers.replies(besides, round_, state)
                records[key] = tensor_record(join(Sections(model, sent.model.buffers, replies)))
            like[worker] = records[key]
        return like

    def _decoded(
        self, begun: Mapping[str, Tensor], updates: Mapping[int, Screened], round_: int
    ) -> tuple[dict[int, Screened], dict[int, str]]:
        """The `updates` with decoded parameters, which are differences from `begun`, and why others cannot be used."""
        codec, seed = self.layers.wire.up, self.layers.wire.seed
        assert codec is not None
        parts = {worker: split(each.arrays) for worker, each in updates.items()}
        problems = why_undecodable(codec, [part.parameters for part in parts.values()], begun)
        reasons = {worker: reason for worker, reason in zip(parts, problems, strict=True) if reason}
        decoded: dict[int, Tensors] = {}
        for worker, part in parts.items():
            if worker in reasons:
                continue
            like = beside(part.parameters, begun)
            moved = decode(codec, part.parameters, like, seed(round_, worker))
            decoded[worker] = join(part._replace(parameters=moved))
        wrong = dict(zip(decoded, wrong_values(list(decoded.values())), strict=True))
        reasons |= {worker: reason for worker, reason in wrong.items() if reason}
        kept = {worker: updates[worker]._replace(arrays=decoded[worker]) for worker in decoded if not wrong[worker]}
        return kept, reasons

    def _update(self, screened: Screened) -> Update:
        parameters, buffers, replies = split(screened.arrays)
        of_layers = {name: under_prefix(f"{name}/", replies) for name, _ in self.layers}
        return Update(screened.weight, parameters, buffers, of_layers, screened.metrics)

    # The methods below are for Flower's own loop (`Strategy.start`), which passes on neither the request nor the state:
    # these three attributes hold them between calls. fedsim's loop uses none of them.

    _request: Request | None = None
    _state: State | None = None
    last: Aggregate | None = None  # the outcome of the last `aggregate_train`

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """`request` as Flower's loop calls it, to the connected nodes among `workers`, or to all connected nodes."""
        connected = sorted(grid.get_node_ids())
        nodes = {node: self.workers.get(node, node) for node in connected if not self.workers or node in self.workers}
        holders = self.last.averaged if self.last else ()
        self._request = self.request(server_round, arrays, config, nodes, self._state, holders)
        return self._request.messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """`aggregate` as Flower's loop calls it; None, None where too few updates are usable."""
        if self._request is None:
            raise RuntimeError("aggregate_train needs configure_train before it")
        self.last = self.aggregate(server_round, self._request, replies, self._state or {})
        self._state = self.last.state
        return (self.last.arrays, self.last.metrics) if self.last.arrays else (None, None)


def _beside(tensors: Mapping[str, Tensor], sent: Sent) -> Sent:
    """`sent` with the model on the device of `tensors`."""
    model = Sections(*(beside(tensors, part) for part in sent.model))
    return sent._replace(model=model, begun=beside(tensors, sent.begun))


def mean_metrics(updates: Sequence[Screened], weights: Sequence[float], weighted_by: str) -> MetricRecord:
    """The weighted mean of every number that all workers report, except the weight itself."""
    means = MetricRecord()
    for name in updates[0].metrics:
        values = [update.metrics.get(name) for update in updates]
        numbers = [value for value in values if isinstance(value, int | float)]
        if name != weighted_by and len(numbers) == len(values):
            means[name] = math.fsum(weight * number for weight, number in zip(weights, numbers, strict=True))
    return means
