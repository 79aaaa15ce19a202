"""LocalSGD (Stich 2019, "Local SGD Converges Fast and Communicates Little"): average what every worker sends.

The mean is FedAvg's, made exact and repeatable:

- replies are sorted by worker before they are summed, so that the order of their arrival changes no bit;
- sums are taken in float64, where the updates are, so that K identical workers average to themselves for every K;
- BatchNorm's running statistics are averaged like any other array, or taken from worker 0;
- integer arrays (BN's ``num_batches_tracked``) stay integers: the largest is taken, not a rounded mean;
- an update that is not finite, misshapen, oversized or badly weighted, and a worker that does not answer, is left
  out, named in the log and in `left_out`; a late or second reply changes nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from logging import WARNING
from typing import Any, NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from strategies.tensor_array import tensor_record, tensors_like

BATCHNORM_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
DECLINED = "declined"  # record with the reason of a client that has nothing to send in this round
MOST_REASON = 200  # characters
MOST_METRICS = 1000  # numbers in a reply
CPU_BLOCK = 2**15  # values that are averaged at a time: their float64 sums stay in a core's cache, twice as fast


class Update(NamedTuple):
    """What one worker sent."""

    weight: float
    arrays: dict[str, Tensor]
    metrics: MetricRecord


class LocalSGD(FedAvg):
    """Average the arrays of all workers, weighted by ``num-examples``.

    `workers` maps node ids to worker numbers (Flower's node ids are random): who may be asked, and the order of
    the sum. Without it every connected node may be asked, in the order of node ids. Of these, `fraction_train` are
    sampled in each round, by `seed` and the round: the same workers in every run. `population` is the number of
    workers that are sampled from, those included whose node is not connected (default: as many as `workers`).

    Fewer usable updates than `min_updates` give no average. A usable one weighs at most `max_examples` and reports
    each of `metrics` as a finite number. `batchnorm_at_sync` is ``average`` or ``worker-0`` (the first of those
    averaged). Other arguments are FedAvg's.
    """

    def __init__(
        self,
        workers: Mapping[int, int] | None = None,
        batchnorm_at_sync: str = "average",
        seed: int = 0,
        population: int = 0,
        min_updates: int = 1,
        max_examples: float = 2.0**53,
        metrics: Sequence[str] = (),
        **fedavg: Any,
    ) -> None:
        super().__init__(**fedavg)
        self.workers = dict(workers or {})
        self.batchnorm_at_sync = batchnorm_at_sync
        self.seed = seed
        self.population = population
        self.min_updates = min_updates
        self.max_examples = max_examples
        self.metrics = metrics
        self.averaged: list[int] = []  # the workers whose updates made the last average
        self.left_out: dict[int, str] = {}  # the others of that round -> reason
        self._sent = ArrayRecord()
        self._asked: dict[int, int] = {}  # node -> worker
        self._away: list[int] = []  # sampled workers that are not connected
        self._messages: list[Message] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One train message with the global arrays for each sampled worker that is connected, in their order."""
        connected = sorted(grid.get_node_ids())
        nodes = {self.workers.get(node, node): node for node in connected if not self.workers or node in self.workers}
        sampled = self._sample(server_round, nodes)
        self._sent = arrays
        self._asked = {nodes[worker]: worker for worker in sampled if worker in nodes}
        self._away = [worker for worker in sampled if worker not in nodes]
        config["server-round"] = server_round
        record = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        self._messages = list(self._construct_messages(record, list(self._asked), MessageType.TRAIN))
        return self._messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The weighted mean of arrays and of metrics over the usable replies; None, None where they are too few."""
        updates = self._usable_updates(replies)
        for worker, reason in self.left_out.items():
            log(WARNING, "round %s: worker %s is left out of the average: %s", server_round, worker, reason)
        self.averaged = sorted(updates) if len(updates) >= self.min_updates else []
        if not self.averaged:
            return None, None
        used = [updates[worker] for worker in self.averaged]
        total = math.fsum(update.weight for update in used)
        weights = [update.weight / total for update in used]
        averaged = {name: self._combine(name, [update.arrays[name] for update in used], weights) for name in self._sent}
        return tensor_record(averaged), self._mean_metrics([update.metrics for update in used], weights)

    def _sample(self, server_round: int, nodes: Mapping[int, int]) -> list[int]:
        """The workers of a round: drawn from all there are, connected or not, so that who is away moves no other."""
        everyone = list(range(self.population)) or sorted(self.workers.values()) or sorted(nodes)
        if self.fraction_train >= 1:
            return everyone
        chance = random.Random(f"{self.seed}/{server_round}")
        return sorted(chance.sample(everyone, sample_size(len(everyone), self.fraction_train)))

    def _usable_updates(self, replies: Iterable[Message]) -> dict[int, Update]:
        """The updates by their workers; why the others are left out is noted."""
        updates: dict[int, Update] = {}
        self.left_out = dict.fromkeys(self._away, "its node is not connected")
        ids = {message.metadata.message_id for message in self._messages}
        for reply in replies:
            worker = self._asked.get(reply.metadata.src_node_id)
            late = reply.metadata.reply_to_message_id not in ids
            # Flower's own word that a node is gone comes from none of the nodes
            if worker is None or late or worker in updates or worker in self.left_out:
                continue
            try:
                updates[worker] = self._usable(reply)
            except _Unusable as reason:
                self.left_out[worker] = str(reason)
        for worker in self._asked.values():
            if worker not in updates:
                self.left_out.setdefault(worker, "it did not answer")
        return updates

    def _combine(self, name: str, parts: list[Tensor], weights: list[float]) -> Tensor:
        if self.batchnorm_at_sync == "worker-0" and name.rpartition(".")[2] in BATCHNORM_STATISTICS:
            return parts[0]
        if not parts[0].is_floating_point():
            return torch.stack(parts).amax(0)
        return weighted_mean(parts, weights)

    def _usable(self, reply: Message) -> Update:
        """The update in a reply, checked against what was sent."""
        if reply.has_error():
            raise _Unusable(f"its client failed ({reply.error.reason})")
        if DECLINED in reply.content.config_records:
            raise _Unusable(str(reply.content.config_records[DECLINED].get("reason"))[:MOST_REASON])
        arrays = reply.content.array_records.get(self.arrayrecord_key)
        if arrays is None or len(reply.content.metric_records) != 1 or len(reply.content) != 2:
            raise _Unusable(f"it sent other records than {self.arrayrecord_key} and one of metrics")
        metrics = next(iter(reply.content.metric_records.values()))
        weight = self._usable_weight(metrics)
        try:
            tensors = tensors_like(arrays, self._sent)
        except ValueError as error:
            raise _Unusable(str(error)) from error
        # 0 * x is 0 but for infinities and NaN; on a CPU `isfinite` takes three times as long
        wrong = torch.stack([tensor.mul(0).any() for tensor in tensors.values()]).tolist()
        if any(wrong):  # asked once, so that a GPU is waited for once
            raise _Unusable(f"{list(tensors)[wrong.index(True)]} is not finite")
        return Update(weight, tensors, metrics)

    def _usable_weight(self, metrics: MetricRecord) -> float:
        """The weight in `metrics`, which must report what is asked for and no flood of numbers."""
        if sum(len(value) if isinstance(value, list) else 1 for value in metrics.values()) > MOST_METRICS:
            raise _Unusable(f"its metrics are more than {MOST_METRICS} numbers")
        for name in self.metrics:
            value = metrics.get(name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise _Unusable(f"{name} is {value}")
        weight = metrics.get(self.weighted_by_key)
        if not isinstance(weight, int | float) or not 0 < weight <= self.max_examples:
            raise _Unusable(f"{self.weighted_by_key} is {weight}")
        return float(weight)

    def _mean_metrics(self, records: list[MetricRecord], weights: list[float]) -> MetricRecord:
        """The weighted mean of every number that all workers report."""
        means = MetricRecord()
        for name in records[0]:
            values = [record.get(name) for record in records]
            numbers = [value for value in values if isinstance(value, int | float)]
            if name != self.weighted_by_key and len(numbers) == len(records):
                means[name] = math.fsum(weight * number for weight, number in zip(weights, numbers, strict=True))
        return means


def sample_size(workers: int, fraction: float) -> int:
    """How many of `workers` a round samples: the nearest whole number, at least one."""
    return max(1, round(fraction * workers))


def weighted_mean(parts: list[Tensor], weights: list[float]) -> Tensor:
    """The mean of equally shaped tensors, summed in float64 in their order, in their own precision.

    `weights` sum to one. The first tensor is taken as the origin: sum w_i (x_i - x_0) + x_0 gives exactly x_0
    where all x_i are equal, whatever the rounding of the weights. Every operation rounds by itself (no fused
    multiply-add), so that the layout of the tensors, and the device, change no bit.
    """
    mean = torch.empty_like(parts[0])
    for block, first, *others in zip(_blocks(mean), *(_blocks(part) for part in parts), strict=True):
        origin = first.double()
        offset = torch.zeros_like(origin)
        for other, weight in zip(others, weights[1:], strict=True):
            offset.add_(other.double().sub_(origin).mul_(weight))
        block.copy_(offset.add_(origin))
    return mean


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of a tensor's rows, as many at a time as are best summed together: on a GPU, all."""
    rows = tensor if tensor.ndim else tensor.view(1)
    if tensor.device.type != "cpu" or tensor.numel() <= CPU_BLOCK:
        return (rows,)
    return torch.split(rows, max(1, CPU_BLOCK * len(rows) // tensor.numel()))


class _Unusable(Exception):
    """Why an update cannot be averaged."""
