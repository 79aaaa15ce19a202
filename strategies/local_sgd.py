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
from typing import Any, NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from strategies.batchnorm import batchnorm_domains, merge
from strategies.compression import Codec, broadcast, decode, encode, why_undecodable
from strategies.outer import OuterStep
from strategies.robust import Mean, combine
from strategies.screening import NOT_NEGATIVE, Domain, Request, Rules, Update, screen, wrong_values
from strategies.sections import BUFFERS, Sections, beside, join, split, under_prefix, with_prefix
from strategies.tensor_array import tensor_record, tensors_of

State = dict[str, Any]  # tensors and numbers
BROADCAST = "broadcast/"  # prefix of the entries of the server's state that belong to `compression.broadcast`
ENCODED = "encoded"  # key of a message's config: true where its parameters are the message of a `broadcast`
log = logging.getLogger(__name__)


class Aggregate(NamedTuple):
    """The outcome of a round; `arrays` is None where too few updates were usable."""

    arrays: ArrayRecord | None
    metrics: MetricRecord
    state: State
    averaged: dict[int, MetricRecord]  # worker -> what it reported
    left_out: dict[int, str]  # the other sampled workers -> reason


class LocalSGD(FedAvg):
    """Average the arrays of all workers, weighted by ``num-examples``.

    `workers` maps node ids to worker numbers (Flower's node ids are random): these nodes may be sampled, and are summed
    in the order of their numbers. Without it every connected node may be, in the order of node ids. In each round
    `fraction_train` of them are sampled, by `seed` and the round: the same workers in every run. `population` is the
    number of workers that are sampled from, including those whose node is not connected (default: as many as
    `workers`).

    Fewer usable updates than `min_updates` give no average. A usable one weighs what `examples(round, worker)` allows
    and reports each of `metrics`, a value in its domain; the values of its arrays are in their `domains(round)` (see
    `strategies.screening.Rules`); `other_records` may come with it.

    `batchnorm` names the buffers of BatchNorm layers (see
    `batchnorm_buffers`), and `batchnorm_at_sync` says how they are merged (see `strategies.batchnorm.merge`). `mean`
    and `trim` choose another mean than the exact one (see `strategies.robust`).

    With a `codec`, workers send the encoded difference of the parameters that they began from and their own, with the
    seed `codec_seed(round, worker)`. With a `codec_down`, they are sent the encoded change of the parameters, with the
    seed `codec_seed(round, None)` (see `strategies.compression.broadcast`).

    `outer` is the server's step on the mean of the parameters, and `lr(round)` the workers' learning rate at the end of
    a round. Extras whose names begin with `population_extras` are means over the population: a worker that is not
    averaged counts with the values that were sent. Other arguments are FedAvg's.
    """

    def __init__(
        self,
        workers: Mapping[int, int] | None = None,
        seed: int = 0,
        population: int = 0,
        min_updates: int = 1,
        examples: Callable[[int, int], Domain] = lambda round_, worker: NOT_NEGATIVE,
        metrics: Mapping[str, Domain] | None = None,
        domains: Callable[[int], Mapping[str, Domain]] = lambda round_: {},
        other_records: Sequence[str] = (),
        batchnorm: Mapping[str, str] | None = None,
        batchnorm_at_sync: str = "average",
        mean: Mean = "exact",
        trim: float = 0.0,
        codec: Codec | None = None,
        codec_down: Codec | None = None,
        codec_seed: Callable[[int, int | None], int] = lambda round_, worker: 0,
        outer: OuterStep | None = None,
        lr: Callable[[int], float] = lambda round_: 1.0,
        population_extras: str | None = None,
        **fedavg: Any,
    ) -> None:
        super().__init__(**fedavg)
        self.workers = dict(workers or {})
        self.seed = seed
        self.population = population
        self.min_updates = min_updates
        self.batchnorm = dict(batchnorm or {})
        self.batchnorm_at_sync = batchnorm_at_sync
        self.mean = mean
        self.trim = trim
        self.codec = codec
        self.codec_down = codec_down
        self.codec_seed = codec_seed
        self.outer = outer or OuterStep()
        self.lr = lr
        self.population_extras = population_extras
        self.examples = examples
        self.domains = domains
        of_buffers = batchnorm_domains(self.batchnorm, batchnorm_at_sync)
        self.rules = Rules(
            self.arrayrecord_key,
            self.weighted_by_key,
            metrics=metrics or {},
            domains={BUFFERS + name: domain for name, domain in of_buffers.items()},
            other_records=other_records,
        )

    def request(
        self,
        round_: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        nodes: Mapping[int, int],
        state: Mapping[str, Any] | None = None,
        holders: Collection[int] = (),
    ) -> Request:
        """The train messages of a round, in the order of the workers: `arrays` for each sampled one of `nodes`.

        With a `codec_down`, `holders` are the workers that hold the parameters that the last round began from, which
        are in the server's `state`: they are sent the encoded change, all others the parameters after this change.
        """
        node_of = {worker: node for node, worker in nodes.items()}
        everyone = list(range(self.population)) or sorted(self.workers.values()) or sorted(node_of)
        sampled = self.sample(round_, everyone)
        workers = {node_of[worker]: worker for worker in sampled if worker in node_of}
        away = [worker for worker in sampled if worker not in node_of]
        config["server-round"] = round_
        if self.codec_down is None:
            content = self._content(arrays, config)
            return Request(arrays, [Message(content, node, MessageType.TRAIN) for node in workers], workers, away)

        x = split(tensors_of(arrays))
        own = under_prefix(BROADCAST, state or {})
        seed = self.codec_seed(round_, None)
        sent = broadcast(self.codec_down, x.parameters, beside(x.parameters, own), seed)
        begun = tensor_record(join(x._replace(parameters=sent.parameters)))
        whole = self._content(begun, config)
        encoded = tensor_record(join(x._replace(parameters=sent.message)))
        change = self._content(encoded, ConfigRecord({**config, ENCODED: True}))
        messages = [
            Message(change if worker in holders and sent.message else whole, node, MessageType.TRAIN)
            for node, worker in workers.items()
        ]
        return Request(begun, messages, workers, away, arrays, with_prefix(BROADCAST, sent.state))

    def _content(self, arrays: ArrayRecord, config: ConfigRecord) -> RecordDict:
        return RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})

    def sample(self, round_: int, everyone: list[int]) -> list[int]:
        """The workers of a round: the nearest whole number to `fraction_train` of `everyone`, at least one.

        They are drawn from all workers, connected or not, so that a lost connection does not change who else is drawn.
        """
        if self.fraction_train >= 1:
            return everyone
        size = max(1, round(self.fraction_train * len(everyone)))
        return sorted(random.Random(f"{self.seed}/{round_}").sample(everyone, size))

    def aggregate(self, round_: int, request: Request, replies: Iterable[Message], state: State) -> Aggregate:
        """The global arrays after a round, and the server's state after it.

        Raises FloatingPointError where these are not finite, or outside their domains: no further round can then be
        trained.
        """
        domains = {**self.rules.domains, **self.domains(round_)}
        examples = functools.partial(self.examples, round_)
        rules = dataclasses.replace(self.rules, examples=examples, domains=domains)
        sent = split(tensors_of(request.arrays))
        like = self._encoded(self.codec, sent) if self.codec else request.arrays
        updates, left_out = screen(replies, request, rules, like)
        if self.codec:
            updates, undecodable = self._decoded(self.codec, sent.parameters, updates, round_)
            left_out = dict(sorted((left_out | undecodable).items()))
        for worker, reason in left_out.items():
            log.warning("round %s: worker %s is left out of the average: %s", round_, worker, reason)
        if len(updates) < self.min_updates:
            return Aggregate(None, MetricRecord(), state, {}, left_out)

        averaged = sorted(updates)
        used = [updates[worker] for worker in averaged]
        samples = math.fsum(update.weight for update in used)
        weights = [update.weight / samples for update in used]

        y = [split(update.arrays) for update in used]
        received = used[0].arrays
        sent = Sections(*(beside(received, part) for part in sent))
        x = sent.parameters if request.model is None else beside(received, split(tensors_of(request.model)).parameters)
        average = self._average(x, sent, y, weights)
        outer_state = {name: value for name, value in state.items() if not name.startswith(BROADCAST)}
        parameters, state = self.next_parameters(
            round_, x, average.parameters, dict(zip(averaged, used, strict=True)), beside(received, outer_state)
        )
        state = {**state, **request.state}
        buffers = merge(average.buffers, [part.buffers for part in y], weights, self.batchnorm_at_sync, self.batchnorm)
        extras = self._over_population(sent.extras, average.extras, len(averaged))
        arrays = join(Sections(parameters, buffers, extras))

        remembered = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        for what, wrong in zip(("average", "server's state"), wrong_values([arrays, remembered], domains), strict=True):
            if wrong:
                raise FloatingPointError(f"round {round_}: the {what} of {wrong}")
        metrics = mean_metrics(used, weights, self.weighted_by_key)
        reported = {worker: updates[worker].metrics for worker in averaged}
        return Aggregate(tensor_record(arrays), metrics, state, reported, left_out)

    def next_parameters(
        self, round_: int, x: dict[str, Tensor], mean: dict[str, Tensor], updates: Mapping[int, Update], state: State
    ) -> tuple[dict[str, Tensor], State]:
        """The parameters after a round and the next state: here by the server step from the `mean` of the `updates`."""
        return self.server_step(x, mean, state, round_)

    def server_step(
        self, x: dict[str, Tensor], mean: dict[str, Tensor], state: State, round_: int
    ) -> tuple[dict[str, Tensor], State]:
        """The parameters after a round and the next state, by the outer step from `x` and the `mean` of the workers.

        `state`, tensors and numbers by name, is {} before the first round, then what the last call returned. The
        arguments may not be changed in place.
        """
        return self.outer(x, mean, state, self.lr(round_))

    def _average(
        self, x: Mapping[str, Tensor], sent: Sections, y: Sequence[Sections], weights: Sequence[float]
    ) -> Sections:
        """The mean of what the workers sent, section by section; `y` has decoded updates where there is a codec.

        Where the workers began from other parameters than the global ones `x`, their mean update is applied to `x`.
        """
        start = sent.parameters
        if self.codec:
            sent = sent._replace(parameters={name: torch.zeros_like(value) for name, value in start.items()})
        parts = zip(sent, zip(*y, strict=True), strict=True)
        average = Sections(*(combine(self.mean, before, each, weights, self.trim) for before, each in parts))
        mean = average.parameters
        if self.codec:
            mean = {name: x[name] - distance for name, distance in mean.items()}
        elif self.codec_down:
            mean = {name: x[name] - (start[name] - value) for name, value in mean.items()}
        return average._replace(parameters=mean)

    def _over_population(self, sent: Mapping[str, Tensor], mean: dict[str, Tensor], averaged: int) -> dict[str, Tensor]:
        """`mean`, over the `averaged` workers, with the extras of the population as means over the population."""
        share = averaged / (self.population or len(self.workers) or averaged)
        if self.population_extras is None or share == 1:
            return mean
        of_all = [name for name in mean if name.startswith(self.population_extras)]
        return mean | {name: sent[name].lerp(mean[name], share) for name in of_all}

    def _encoded(self, codec: Codec, sent: Sections) -> ArrayRecord:
        """Arrays with the names, types and shapes that those of an encoded update must have."""
        zeros = {name: torch.zeros_like(value) for name, value in sent.parameters.items()}
        message, _ = encode(codec, zeros, {}, 0, feedback=False)
        return tensor_record(join(sent._replace(parameters=message)))

    def _decoded(
        self, codec: Codec, x: Mapping[str, Tensor], updates: Mapping[int, Update], round_: int
    ) -> tuple[dict[int, Update], dict[int, str]]:
        """The `updates` with decoded parameters, which are differences from `x`, and why others cannot be used."""
        parts = {worker: split(update.arrays) for worker, update in updates.items()}
        problems = why_undecodable([part.parameters for part in parts.values()], x)
        reasons = {worker: reason for worker, reason in zip(parts, problems, strict=True) if reason}
        decoded: dict[int, dict[str, Tensor]] = {}
        for worker, part in parts.items():
            if worker in reasons:
                continue
            like = beside(part.parameters, x)
            moved = decode(codec, part.parameters, like, self.codec_seed(round_, worker))
            decoded[worker] = join(part._replace(parameters=moved))
        wrong = dict(zip(decoded, wrong_values(list(decoded.values())), strict=True))
        reasons |= {worker: reason for worker, reason in wrong.items() if reason}
        kept = {worker: updates[worker]._replace(arrays=decoded[worker]) for worker in decoded if not wrong[worker]}
        return kept, reasons

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


def mean_metrics(updates: Sequence[Update], weights: Sequence[float], weighted_by: str) -> MetricRecord:
    """The weighted mean of every number that all workers report, except the weight itself."""
    means = MetricRecord()
    for name in updates[0].metrics:
        values = [update.metrics.get(name) for update in updates]
        numbers = [value for value in values if isinstance(value, int | float)]
        if name != weighted_by and len(numbers) == len(values):
            means[name] = math.fsum(weight * number for weight, number in zip(weights, numbers, strict=True))
    return means
