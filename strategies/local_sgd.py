"""LocalSGD (Stich 2019, "Local SGD Converges Fast and Communicates Little"): average what every worker sends.

A round is: sample workers, screen their updates, take the weighted mean, take the server's step. The mean is
FedAvg's, made exact and repeatable: workers are summed in their order, never in that of their replies, and in
float64, so that K identical workers average to themselves for every K.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from strategies.batchnorm import merge
from strategies.compression import Codec, decode, encode
from strategies.outer import OuterStep
from strategies.robust import Mean, combine
from strategies.screening import Request, Rules, Update, not_finite, printable, screen
from strategies.sections import BUFFERS, Sections, join, split
from strategies.tensor_array import tensor_record, tensors_of

State = dict[str, Any]  # tensors and numbers
log = logging.getLogger(__name__)


class Aggregate(NamedTuple):
    """The outcome of a round; without arrays where too few updates were usable."""

    arrays: ArrayRecord | None
    metrics: MetricRecord
    state: State
    samples: float  # the weights of the updates averaged, together
    averaged: list[int]  # workers
    left_out: dict[int, str]  # the other sampled workers -> reason


class LocalSGD(FedAvg):
    """Average the arrays of all workers, weighted by ``num-examples``.

    `workers` maps node ids to worker numbers (Flower's node ids are random): who may be asked, and the order of
    the sum. Without it every connected node may be asked, in the order of node ids. Of these, `fraction_train` are
    sampled in each round, by `seed` and the round: the same workers in every run. `population` is the number of
    workers that are sampled from, including those whose node is not connected (default: as many as `workers`).

    Fewer usable updates than `min_updates` give no average. A usable one weighs at most `max_examples(round)` and
    reports each of `metrics`; `other_records` may come with it. `batchnorm` names the buffers of BatchNorm layers (see
    `batchnorm_buffers`), and `batchnorm_at_sync` says how they are merged: ``average`` or ``first-worker`` (the first
    worker averaged). `mean` and `trim` choose another mean than the exact one (see `strategies.robust`). With a
    `codec`, workers send their parameters as the encoded distance from those that they were sent, by the seed
    `codec_seed(round, worker)`. `outer` is the server's step on the mean of the parameters, and `lr`
    gives the workers' learning rate at the end of a round. Extras whose names begin with `population_extras` are means
    over the population: a worker that is not averaged counts with the values that were sent. Other arguments are
    FedAvg's.
    """

    def __init__(
        self,
        workers: Mapping[int, int] | None = None,
        seed: int = 0,
        population: int = 0,
        min_updates: int = 1,
        max_examples: Callable[[int], float] = lambda round_: 2.0**53,
        metrics: Sequence[str] = (),
        other_records: Sequence[str] = (),
        batchnorm: Mapping[str, str] | None = None,
        batchnorm_at_sync: str = "average",
        mean: Mean = "exact",
        trim: float = 0.0,
        codec: Codec | None = None,
        codec_seed: Callable[[int, int], int] = lambda round_, worker: 0,
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
        self.codec_seed = codec_seed
        self.outer = outer or OuterStep(None)
        self.lr = lr
        self.population_extras = population_extras
        variances = [BUFFERS + name for name, entry in self.batchnorm.items() if entry == "running_var"]
        self.max_examples = max_examples
        self.rules = Rules(
            self.arrayrecord_key,
            self.weighted_by_key,
            metrics=metrics,
            nonnegative=variances,
            other_records=other_records,
        )

    def request(self, round_: int, arrays: ArrayRecord, config: ConfigRecord, nodes: Mapping[int, int]) -> Request:
        """The train messages of a round, in the order of the workers: `arrays` for each sampled one of `nodes`."""
        node_of = {worker: node for node, worker in nodes.items()}
        everyone = list(range(self.population)) or sorted(self.workers.values()) or sorted(node_of)
        sampled = self.sample(round_, everyone)
        config["server-round"] = round_
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        workers = {node_of[worker]: worker for worker in sampled if worker in node_of}
        messages = [Message(content, node, MessageType.TRAIN) for node in workers]
        return Request(arrays, messages, workers, [worker for worker in sampled if worker not in node_of])

    def sample(self, round_: int, everyone: list[int]) -> list[int]:
        """The workers of a round: drawn from all, connected or not, so that one that is away moves no other."""
        if self.fraction_train >= 1:
            return everyone
        chance = random.Random(f"{self.seed}/{round_}")
        return sorted(chance.sample(everyone, sample_size(len(everyone), self.fraction_train)))

    def aggregate(self, round_: int, request: Request, replies: Iterable[Message], state: State) -> Aggregate:
        """The global arrays after a round, and the server's state after it.

        Raises FloatingPointError where these arrays are not finite: no further round can then be trained.
        """
        rules = dataclasses.replace(self.rules, max_examples=self.max_examples(round_))
        sent = split(tensors_of(request.arrays))
        like = self._encoded(self.codec, sent) if self.codec else request.arrays
        updates, left_out = screen(replies, request, rules, like)
        if self.codec:
            updates, undecodable = self._decoded(self.codec, sent.parameters, updates, round_)
            left_out = dict(sorted((left_out | undecodable).items()))
        for worker, reason in left_out.items():
            log.warning("round %s: worker %s is left out of the average: %s", round_, worker, reason)
        if len(updates) < self.min_updates:
            return Aggregate(None, MetricRecord(), state, 0, [], left_out)

        averaged = sorted(updates)
        used = [updates[worker] for worker in averaged]
        samples = math.fsum(update.weight for update in used)
        weights = [update.weight / samples for update in used]

        y = [split(update.arrays) for update in used]
        device = next((value.device for value in used[0].arrays.values()), None)
        sent = Sections(*(_on(device, part) for part in sent))
        average = self._average(sent, y, weights)
        parameters, state = self.server_step(sent.parameters, average.parameters, _on(device, state), round_)
        buffers = merge(average.buffers, y[0].buffers, self.batchnorm_at_sync, self.batchnorm)
        extras = self._over_population(sent.extras, average.extras, len(averaged))
        arrays = join(Sections(parameters, buffers, extras))

        if wrong := not_finite(arrays):
            raise FloatingPointError(f"round {round_}: the average of {wrong} is not finite")
        metrics = mean_metrics(used, weights, self.weighted_by_key)
        return Aggregate(tensor_record(arrays), metrics, state, samples, averaged, left_out)

    def server_step(
        self, x: dict[str, Tensor], mean: dict[str, Tensor], state: State, round_: int
    ) -> tuple[dict[str, Tensor], State]:
        """The parameters after a round, by the outer step, from those before it and the mean of the workers'.

        `state`, tensors and numbers by name, is what the server remembers between rounds: {} before the first, then
        what the last call returned. Neither argument may be changed in place.
        """
        return self.outer(x, mean, state, self.lr(round_))

    def _average(self, sent: Sections, y: Sequence[Sections], weights: Sequence[float]) -> Sections:
        """The mean of what the workers sent, section by section; decoded parameters are distances from those sent."""
        x = sent.parameters
        if self.codec:
            sent = sent._replace(parameters={name: torch.zeros_like(value) for name, value in x.items()})
        parts = zip(sent, zip(*y, strict=True), strict=True)
        average = Sections(*(combine(self.mean, before, each, weights, self.trim) for before, each in parts))
        if self.codec:
            average = average._replace(parameters={name: x[name] - average.parameters[name] for name in x})
        return average

    def _over_population(self, sent: Mapping[str, Tensor], mean: dict[str, Tensor], averaged: int) -> dict[str, Tensor]:
        """`mean`, which is over so many workers, with the extras of the population as means over all of it."""
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
        """The updates with their parameters decoded, which are distances from `x`, and why others cannot be used."""
        decoded: dict[int, Update] = {}
        reasons: dict[int, str] = {}
        for worker, update in updates.items():
            parts = split(update.arrays)
            like = _on(next((part.device for part in parts.parameters.values()), None), x)
            try:
                moved = decode(codec, parts.parameters, like, self.codec_seed(round_, worker))
            except ValueError as error:
                reasons[worker] = printable(error)
                continue
            if wrong := not_finite(moved):
                reasons[worker] = f"{wrong} is not finite"
            else:
                decoded[worker] = update._replace(arrays=join(parts._replace(parameters=moved)))
        return decoded, reasons

    # Flower's own loop (`Strategy.start`) hands neither the request nor the state from call to call, and takes
    # back arrays and metrics alone: these two attributes, and `last`, are kept for it. fedsim uses none of them.

    _request: Request | None = None
    _state: State | None = None
    last: Aggregate | None = None  # the outcome of the last `aggregate_train`

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Flower's form of `request`: to those of `workers`, or of all nodes, that are connected."""
        connected = sorted(grid.get_node_ids())
        nodes = {node: self.workers.get(node, node) for node in connected if not self.workers or node in self.workers}
        self._request = self.request(server_round, arrays, config, nodes)
        return self._request.messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Flower's form of `aggregate`; None, None where too few updates are usable."""
        if self._request is None:
            raise RuntimeError("aggregate_train needs configure_train before it")
        self.last = self.aggregate(server_round, self._request, replies, self._state or {})
        self._state = self.last.state
        return (self.last.arrays, self.last.metrics) if self.last.arrays else (None, None)


def mean_metrics(updates: Sequence[Update], weights: Sequence[float], weighted_by: str) -> MetricRecord:
    """The weighted mean of every number that all workers report, but for the weight itself."""
    means = MetricRecord()
    for name in updates[0].metrics:
        values = [update.metrics.get(name) for update in updates]
        numbers = [value for value in values if isinstance(value, int | float)]
        if name != weighted_by and len(numbers) == len(values):
            means[name] = math.fsum(weight * number for weight, number in zip(weights, numbers, strict=True))
    return means


def sample_size(workers: int, fraction: float) -> int:
    """How many of `workers` a round samples: the nearest whole number, at least one."""
    return max(1, round(fraction * workers))


def _on(device: torch.device | None, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, whose tensors may come from a file or another machine, on `device`."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}
