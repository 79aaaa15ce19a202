"""Which replies of a round may be averaged, and why the others may not.

Nothing that a client sends is trusted: neither its arrays, metrics and texts nor their sizes.
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
NPY_HEADER = 1024  # bytes that a serialized array may have besides its values


class Request(NamedTuple):
    """What was sent to the workers of a round."""

    arrays: ArrayRecord  # that the workers begin from
    messages: list[Message]
    workers: dict[int, int]  # node -> worker, of all messages
    away: list[int]  # sampled workers whose node is not connected
    model: ArrayRecord | None = None  # the global model, where the workers begin from another one
    state: Mapping[str, Tensor] = MappingProxyType({})  # entries for the server's state after the round


class Update(NamedTuple):
    """What one worker sent."""

    weight: float
    arrays: dict[str, Tensor]
    metrics: MetricRecord


@dataclass(frozen=True)
class Rules:
    """What a usable update holds: a record of `arrays`, and metrics with its `weight` and all of `metrics`.

    The weight is at most `max_examples`; the arrays in `nonnegative`, for instance variances, have no negative value.
    The update may also hold `other_records`, which are not checked.
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

    The arrays of an update must have the names, types and shapes of those in `like`. Late replies to earlier rounds,
    second replies and replies of other nodes are ignored.
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
    """Text of a client in a form that can be logged and stored: one line of at most 200 printable characters."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text)[:MAX_TEXT])


def tensors_like(record: ArrayRecord, sent: Mapping[str, Array]) -> dict[str, Tensor]:
    """The tensors of a client's record, which must have the names, types and shapes of the arrays `sent`.

    Raises ValueError with what is wrong. The type and shape that an array claims are compared with those in its bytes,
    which are not parsed where they are too many. Values are not checked.
    """
    if record.keys() != sent.keys():
        raise ValueError(f"its arrays differ from those sent: {min(record.keys() ^ sent.keys())}")
    return {name: _tensor_like(name, record[name], array) for name, array in sent.items()}


def wrong_values(parts: Sequence[Mapping[str, Tensor]], nonnegative: Collection[str] = ()) -> list[str]:
    """For each of `parts`, what is wrong with its values, or "": a tensor is not finite, or has a negative value.

    Only the tensors in `nonnegative` are checked for negative values. A GPU is waited for once, for all `parts`.
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
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}  # multi-tensor kernels need one dtype and device
    for place, tensor in enumerate(tensors):
        if tensor.numel():
            kinds.setdefault((tensor.dtype, tensor.device), []).append(place)
    largest = [0.0] * len(tensors)
    for (_, device), places in kinds.items():
        of_kind = [tensors[place] for place in places]
        if device.type == "cpu":  # 20 times as fast there as the norm
            found = [tensor.abs().amax() for tensor in of_kind]
        else:
            found = list(torch._foreach_norm(of_kind, math.inf))
        for place, value in zip(places, torch.stack(found).tolist(), strict=True):
            largest[place] = value
    return largest


def _usable(reply: Message, sent: ArrayRecord, rules: Rules) -> Update:
    """The update in a reply, its values not yet checked; raises ValueError with the reason if it is not usable."""
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
    """The weight in `metrics`; raises ValueError unless all of them are numbers that can be averaged."""
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
            if not -MAX_METRIC <= value <= MAX_METRIC:  # true of NaN too
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
    except Exception as error:  # NumPy does not document what it raises for damaged bytes
        raise ValueError(f"{name} cannot be read ({printable(error)})") from error
    if (dtype_name(tensor), tuple(tensor.shape)) != expected:  # the header in its bytes says otherwise
        raise ValueError(f"{name} is {dtype_name(tensor)} {list(tensor.shape)}, not as it was sent")
    return tensor
