"""Which replies of a round may be averaged, and why the others may not.

Nothing that a client sends is trusted: not its arrays, its numbers, its text, nor how much of each there is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from torch import Tensor

from strategies.tensor_array import TensorArray, array_bytes, dtype_name, tensor_of

DECLINED = "declined"  # record with the reason of a client that has nothing to send in this round
MAX_TEXT = 200  # characters
MAX_METRICS = 1000  # numbers in a reply
MAX_METRIC = torch.finfo(torch.float32).max  # of a metric's absolute value: means of such numbers cannot overflow
NPY_HEADER = 1024  # bytes that an array may come with besides its values


class Request(NamedTuple):
    """What a round was asked with."""

    arrays: ArrayRecord  # that the workers begin from
    messages: list[Message]
    workers: dict[int, int]  # node -> worker, of all messages
    away: list[int]  # sampled workers whose node is not connected
    model: ArrayRecord | None = None  # the global model, where the workers begin from another one
    state: Mapping[str, Tensor] = MappingProxyType({})  # that the server is to remember of what it sent


class Update(NamedTuple):
    """What one worker sent."""

    weight: float
    arrays: dict[str, Tensor]
    metrics: MetricRecord


@dataclass(frozen=True)
class Rules:
    """What an update must hold: its records, its weight (at most `max_examples`), `metrics` that it must report.

    `nonnegative` names arrays, for instance variances. `other_records` may come besides and are not looked at.
    """

    arrays: str = "arrays"
    weight: str = "num-examples"
    max_examples: float = 2.0**53
    metrics: Sequence[str] = ()
    nonnegative: Collection[str] = ()
    other_records: Collection[str] = ()


def screen(
    replies: Iterable[Message], request: Request, rules: Rules, like: ArrayRecord
) -> tuple[dict[int, Update], dict[int, str]]:
    """The usable updates by worker, and for every other sampled worker the reason why it has none.

    The arrays of an update must be `like` these in names, types and shapes.
    Late replies to earlier rounds, second replies and those of other nodes are ignored.
    """
    ids = {message.metadata.message_id for message in request.messages}
    updates: dict[int, Update] = {}
    left_out = dict.fromkeys(request.away, "its node is not connected")
    for reply in replies:
        # Flower's own report that a node is gone comes from none of the nodes
        worker = request.workers.get(reply.metadata.src_node_id)
        late = reply.metadata.reply_to_message_id not in ids
        if worker is None or late or worker in updates or worker in left_out:
            continue
        try:
            updates[worker] = _usable(reply, like, rules)
        except ValueError as reason:
            left_out[worker] = printable(reason)
    wrong = wrong_values([update.arrays for update in updates.values()], rules.nonnegative)
    for worker, problem in zip(list(updates), wrong, strict=True):
        if problem:
            del updates[worker]
            left_out[worker] = printable(problem)
    for worker in request.workers.values():
        if worker not in updates:
            left_out.setdefault(worker, "it did not answer")
    return updates, dict(sorted(left_out.items()))


def printable(text: object) -> str:
    """Text of a client, fit to be logged and stored: one line of at most 200 printable characters."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text)[:MAX_TEXT])


def tensors_like(record: ArrayRecord, sent: Mapping[str, Array]) -> dict[str, Tensor]:
    """The tensors of a client's record, which must be like those `sent` under their names; values are not looked at.

    Raises ValueError with what is wrong. What an array says of itself is checked against its bytes, and these are
    not parsed where they are too many.
    """
    if record.keys() != sent.keys():
        raise ValueError(f"its arrays are others than those sent: {min(record.keys() ^ sent.keys())}")
    return {name: _tensor_like(name, record[name], array) for name, array in sent.items()}


def wrong_values(parts: Sequence[Mapping[str, Tensor]], nonnegative: Collection[str] = ()) -> list[str]:
    """For each of `parts`, what is wrong with its values, or "": a tensor that is not finite, or is negative.

    A GPU is waited for once, whatever their number. `nonnegative` names tensors.
    """
    floats = [(i, name) for i, part in enumerate(parts) for name in part if part[name].is_floating_point()]
    signed = [(i, name) for i, part in enumerate(parts) for name in part if name in nonnegative]
    tensors = [parts[i][name] for i, name in floats]
    below_zero = list(torch._foreach_clamp_max([parts[i][name] for i, name in signed], 0)) if signed else []
    largest = _largest([*tensors, *below_zero])
    reasons = [""] * len(parts)
    for (i, name), magnitude in zip(floats, largest, strict=False):
        if not math.isfinite(magnitude):
            reasons[i] = reasons[i] or f"{name} is not finite"
    for (i, name), magnitude in zip(signed, largest[len(floats) :], strict=True):
        if magnitude:
            reasons[i] = reasons[i] or f"{name} is negative"
    return reasons


def _largest(tensors: Sequence[Tensor]) -> list[float]:
    """The largest magnitude in each tensor, NaN where there is one; 0 of an empty tensor."""
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}  # multi-tensor kernels take one kind at a time
    for place, tensor in enumerate(tensors):
        if tensor.numel():
            kinds.setdefault((tensor.dtype, tensor.device), []).append(place)
    largest = [0.0] * len(tensors)
    for (_, device), places in kinds.items():
        of_kind = [tensors[place] for place in places]
        if device.type == "cpu":  # where it is 20 times as fast as the norm
            found = [tensor.abs().amax() for tensor in of_kind]
        else:
            found = list(torch._foreach_norm(of_kind, math.inf))
        for place, value in zip(places, torch.stack(found).tolist(), strict=True):
            largest[place] = value
    return largest


def _usable(reply: Message, sent: ArrayRecord, rules: Rules) -> Update:
    """The update in a reply, its values unseen; raises ValueError with the reason where it may not be averaged."""
    if reply.has_error():
        raise ValueError(f"its client failed ({printable(reply.error.reason)})")
    content = reply.content
    if DECLINED in content.config_records:
        raise ValueError(printable(content.config_records[DECLINED].get("reason")))
    arrays = content.array_records.get(rules.arrays)
    others = content.keys() - {rules.arrays, *content.metric_records, *rules.other_records}
    if arrays is None or len(content.metric_records) != 1 or others:
        raise ValueError(f"it sent other records than {rules.arrays} and one of metrics")
    metrics = next(iter(content.metric_records.values()))
    weight = _usable_weight(metrics, rules)
    return Update(weight, tensors_like(arrays, sent), metrics)


def _usable_weight(metrics: MetricRecord, rules: Rules) -> float:
    """The weight in `metrics`, all of which must be numbers that can be averaged."""
    numbers = {name: value if isinstance(value, list) else [value] for name, value in metrics.items()}
    if sum(map(len, numbers.values())) > MAX_METRICS:
        raise ValueError(f"its metrics are more than {MAX_METRICS} numbers")
    weight = metrics.get(rules.weight)
    if not isinstance(weight, int | float) or not 0 < weight <= rules.max_examples:
        raise ValueError(f"{rules.weight} is {printable(weight)}")
    for name in rules.metrics:
        if not isinstance(metrics.get(name), int | float):
            raise ValueError(f"{name} is {printable(metrics.get(name))}")
    for name, values in numbers.items():
        for value in values:
            if not -MAX_METRIC <= value <= MAX_METRIC:  # so is NaN
                raise ValueError(f"{name} is {value}")
    return float(weight)


def _tensor_like(name: str, array: Array, sent: Array) -> Tensor:
    expected = sent.dtype, tuple(sent.shape)
    if (array.dtype, tuple(array.shape)) != expected:
        raise ValueError(f"{name} is {printable(array.dtype)} {list(array.shape)}, not as it was sent")
    if not isinstance(array, TensorArray) and len(array.data) > (most := array_bytes(sent) + NPY_HEADER):
        raise ValueError(f"{name} holds {len(array.data)} bytes, more than {most}")
    try:
        tensor = tensor_of(array)
    except Exception as error:  # whatever NumPy makes of foreign bytes
        raise ValueError(f"{name} cannot be read ({printable(error)})") from error
    if (dtype_name(tensor), tuple(tensor.shape)) != expected:  # its bytes say otherwise than it does
        raise ValueError(f"{name} is {dtype_name(tensor)} {list(tensor.shape)}, not as it was sent")
    return tensor
