"""LocalSGD (Stich 2019, "Local SGD Converges Fast and Communicates Little"): average what every worker sends.

The mean is FedAvg's, made exact and repeatable:

- replies are sorted by worker before they are summed, so that the order of their arrival changes no bit;
- sums are taken in float64, where the updates are, so that K identical workers average to themselves for every K;
- BatchNorm's running statistics are averaged like any other array, or taken from worker 0;
- integer arrays (BN's ``num_batches_tracked``) stay integers: the largest is taken, not a rounded mean;
- an update that is not finite, misshapen or badly weighted is left out, named in the log and in `left_out`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from logging import WARNING
from typing import Any, NamedTuple

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from strategies.tensor_array import dtype_name, tensor_of, tensor_record

BATCHNORM_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Update(NamedTuple):
    """What one worker sent."""

    weight: float
    arrays: dict[str, Tensor]
    metrics: MetricRecord


class LocalSGD(FedAvg):
    """Average the arrays of all workers, weighted by ``num-examples``.

    `workers` maps node ids to worker numbers (Flower's node ids are random): who may be asked, and the order of
    the sum. Without it every connected node may be asked, in the order of node ids. Of these, `fraction_train` are
    sampled in each round, by `seed` and the round: the same workers in every run. `batchnorm_at_sync` is
    ``average`` or ``worker-0`` (the first of those sampled). Other arguments are FedAvg's.
    """

    def __init__(
        self,
        workers: Mapping[int, int] | None = None,
        batchnorm_at_sync: str = "average",
        seed: int = 0,
        **fedavg: Any,
    ) -> None:
        super().__init__(**fedavg)
        self.seed = seed
        self.workers = dict(workers or {})
        self.batchnorm_at_sync = batchnorm_at_sync
        self.left_out: dict[int, str] = {}  # worker -> reason, of the last round
        self._sent: dict[str, tuple[str, tuple[int, ...]]] = {}  # name -> dtype, shape of this round's arrays

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One train message with the global arrays for each sampled worker, in their order."""
        self._sent = {name: (array.dtype, tuple(array.shape)) for name, array in arrays.items()}
        config["server-round"] = server_round
        record = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        nodes = sorted(self.workers or grid.get_node_ids(), key=self._worker)
        if self.fraction_train < 1:
            chance = random.Random(f"{self.seed}/{server_round}")
            nodes = sorted(chance.sample(nodes, sample_size(len(nodes), self.fraction_train)), key=self._worker)
        return self._construct_messages(record, nodes, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The weighted mean of arrays and of metrics over the usable replies; None, None where there are none."""
        self.left_out = {}
        updates: list[Update] = []
        for reply in sorted(replies, key=lambda reply: self._worker(reply.metadata.src_node_id)):
            try:
                updates.append(self._usable(reply))
            except _Unusable as reason:
                worker = self._worker(reply.metadata.src_node_id)
                self.left_out[worker] = str(reason)
                log(WARNING, "round %s: worker %s is left out of the average: %s", server_round, worker, reason)
        if not updates:
            return None, None
        total = math.fsum(update.weight for update in updates)
        weights = [update.weight / total for update in updates]
        averaged = {
            name: self._combine(name, [update.arrays[name] for update in updates], weights) for name in self._sent
        }
        return tensor_record(averaged), self._mean_metrics([update.metrics for update in updates], weights)

    def _worker(self, node_id: int) -> int:
        return self.workers.get(node_id, node_id)

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
        arrays = reply.content.array_records.get(self.arrayrecord_key)
        if arrays is None or len(reply.content.metric_records) != 1:
            raise _Unusable(f"it sent no {self.arrayrecord_key} or not one record of metrics")
        metrics = next(iter(reply.content.metric_records.values()))
        weight = metrics.get(self.weighted_by_key)
        if not isinstance(weight, int | float) or not (math.isfinite(weight) and weight > 0):
            raise _Unusable(f"{self.weighted_by_key} is {weight}")
        if arrays.keys() != self._sent.keys():
            raise _Unusable(f"its arrays are others than those sent: {sorted(arrays.keys() ^ self._sent.keys())[0]}")
        tensors = {name: self._usable_tensor(name, arrays[name]) for name in self._sent}
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
        if not all(finite):  # asked once, so that a GPU is waited for once
            raise _Unusable(f"{list(tensors)[finite.index(False)]} is not finite")
        return Update(float(weight), tensors, metrics)

    def _usable_tensor(self, name: str, array: Array) -> Tensor:
        try:
            tensor = tensor_of(array)
        except (TypeError, ValueError, EOFError) as error:
            raise _Unusable(f"{name} cannot be read ({error})") from error
        if (dtype_name(tensor), tuple(tensor.shape)) != self._sent[name]:
            raise _Unusable(f"{name} is {dtype_name(tensor)} {list(tensor.shape)}, not as it was sent")
        return tensor

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
    origin = parts[0].double()
    offset = torch.zeros_like(origin)
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        offset.add_(part.double().sub_(origin).mul_(weight))
    return offset.add_(origin).to(parts[0].dtype)


class _Unusable(Exception):
    """Why an update cannot be averaged."""
