"""Which replies of a round may be averaged, and why the others may not.

Nothing that a client sends is trusted: neither its arrays, metrics and texts nor their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from torch import Tensor

from strategies.domain import ANY, LIMIT, NOT_NEGATIVE, Domain
from strategies.tensor_array import TensorArray, array_bytes, dtype_name, tensor_of

DECLINED = "declined"  # record with the reason of a client that has nothing to send in this round
MAX_TEXT = 200  # characters
MAX_METRICS = 1000  # numbers in a reply
NPY_HEADER = 1024  # bytes that a serialized array may have besides its values


@dataclass(frozen=True)
class Rules:
    """What a usable update holds: a record of `arrays`, and metrics with its `weight` and all of `metrics`.

    The weight is positive and, of each worker, in `examples(worker)`. The values of arrays and metrics are in the
    domains that `domains` and `metrics` name; those of all others are in `ANY`. The update may also hold
    `other_records`, which are not checked.
    """

    arrays: str = "arrays"
    weight: str = "num-examples"
    examples: Callable[[int], Domain] = lambda worker: NOT_NEGATIVE
    metrics: Mapping[str, Domain] = field(default_factory=dict)
    domains: Mapping[str, Domain] = field(default_factory=dict)
    other_records: Collection[str] = ()


class Screened(NamedTuple):
    """What one worker sent and may be averaged."""

    weight: float
    arrays: dict[str, Tensor]
    metrics: MetricRecord


def screen(
    replies: Iterable[Message],
    messages: Iterable[Message],
    workers: Mapping[int, int],
    like: Mapping[int, ArrayRecord],
    rules: Rules,
) -> tuple[dict[int, Screened], dict[int, str]]:
    """The usable updates by worker, and for each other of `workers` (node -> worker) the reason why it has none.

    `messages` were sent to them, and the arrays of a worker's update must have the names, types and shapes of those in
    its `like`. Late replies to earlier rounds, second replies and replies of other nodes are ignored.
    """
    ids = {message.metadata.message_id for message in messages}
    updates: dict[int, Screened] = {}
    left_out: dict[int, str] = {}
    for reply in replies:
        # Flower's own report that a node is gone comes from none of the nodes
        worker = workers.get(reply.metadata.src_node_id)
        late = reply.metadata.reply_to_message_id not in ids
        if worker is None or late or worker in updates or worker in left_out:
            continue
        try:
            updates[worker] = _usable(reply, worker, like[worker], rules)
        except ValueError as reason:
            left_out[worker] = printable(reason)
    wrong = wrong_values([update.arrays for update in updates.values()], rules.domains)
    for worker, problem in zip(list(updates), wrong, strict=True):
        if problem:
            del updates[worker]
            left_out[worker] = printable(problem)
    for worker in workers.values():
        if worker not in updates:
            left_out.setdefault(worker, "it did not answer")
    return updates, left_out


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


def wrong_values(
    parts: Sequence[Mapping[str, Tensor]], domains: Mapping[str, Domain] = MappingProxyType({})
) -> list[str]:
    """For each of `parts`, what is wrong with its values, or "": a tensor is not finite, or has one outside its domain.

    A tensor that `domains` does not name has `ANY`. A GPU is waited for once, for all `parts`.
    """
    places = [(i, name) for i, part in enumerate(parts) for name in part if _is_checked(part[name], name in domains)]
    tensors = _as_floats([parts[i][name] for i, name in places])
    narrow = [place for place, (_, name) in enumerate(places) if name in domains]
    excess = _excess([tensors[place] for place in narrow], [domains[places[place][1]] for place in narrow])
    largest = _largest([*tensors, *excess])
    reasons = [""] * len(parts)
    for (i, name), magnitude in zip(places, largest, strict=False):
        if not magnitude <= LIMIT:
            reasons[i] = reasons[i] or f"{name} is {'above 1e15' if math.isfinite(magnitude) else 'not finite'}"
    for place, outside in zip(narrow, largest[len(places) :], strict=True):
        i, name = places[place]
        if outside:
            low, high = domains[name]
            what = "negative" if (low, high) == NOT_NEGATIVE else f"not between {low:g} and {high:g}"
            reasons[i] = reasons[i] or f"{name} is {what}"
    return reasons


def _is_checked(tensor: Tensor, named: bool) -> bool:
    """Whether values of `tensor` may be outside its domain; those of a narrower integer type cannot leave `ANY`."""
    return tensor.numel() > 0 and (tensor.is_floating_point() or tensor.dtype == torch.int64 or named)


def _as_floats(tensors: list[Tensor]) -> list[Tensor]:
    """`tensors`, with the integers among them in float64; on a GPU in few kernels."""
    integers = [place for place, tensor in enumerate(tensors) if not tensor.is_floating_point()]
    if not integers:
        return tensors
    converted = [torch.empty_like(tensors[place], dtype=torch.float64) for place in integers]
    torch._foreach_copy_(converted, [tensors[place] for place in integers])
    of_place = dict(zip(integers, converted, strict=True))
    return [of_place.get(place, tensor) for place, tensor in enumerate(tensors)]


def _excess(tensors: list[Tensor], domains: Sequence[Domain]) -> list[Tensor]:
    """By how much the values of each tensor, none of which is empty, leave its domain: zero where they do not."""
    excess = dict.fromkeys(range(len(tensors)), torch.empty(0))
    for (_, device), places in _kinds(tensors).items():
        of_kind, low_and_high = [tensors[place] for place in places], [domains[place] for place in places]
        if device.type == "cpu":
            ends = [torch.stack(tensor.aminmax()) for tensor in of_kind]
            outside = [end - end.clamp(*domain) for end, domain in zip(ends, low_and_high, strict=True)]
        else:
            inside = torch._foreach_clamp_min(of_kind, [float(low) for low, _ in low_and_high])
            torch._foreach_clamp_max_(inside, [float(high) for _, high in low_and_high])
            outside = list(torch._foreach_sub(inside, of_kind))
        excess |= zip(places, outside, strict=True)
    return list(excess.values())


def _largest(tensors: Sequence[Tensor]) -> list[float]:
    """The largest magnitude in each tensor, none of which is empty; NaN where there is one."""
    found: dict[torch.device, tuple[list[int], list[Tensor]]] = {}
    for (_, device), places in _kinds(tensors).items():
        of_kind = [tensors[place] for place in places]
        if device.type == "cpu":  # 20 times as fast there as the norm
            magnitudes = [tensor.abs().amax() for tensor in of_kind]
        else:
            magnitudes = list(torch._foreach_norm(of_kind, math.inf))
        of_device, values = found.setdefault(device, ([], []))
        of_device += places
        values.append(torch.stack(magnitudes).double())
    largest = [0.0] * len(tensors)
    for of_device, values in found.values():  # one wait for each
        for place, value in zip(of_device, torch.cat(values).tolist(), strict=True):
            largest[place] = value
    return largest


def _kinds(tensors: Sequence[Tensor]) -> dict[tuple[torch.dtype, torch.device], list[int]]:
    """The places of `tensors` by dtype and device: multi-tensor kernels need one of each."""
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for place, tensor in enumerate(tensors):
        kinds.setdefault((tensor.dtype, tensor.device), []).append(place)
    return kinds


def _usable(reply: Message, worker: int, sent: ArrayRecord, rules: Rules) -> Screened:
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
    weight = _usable_weight(metrics, worker, rules)
    return Screened(weight, tensors_like(arrays, sent), metrics)


def _usable_weight(metrics: MetricRecord, worker: int, rules: Rules) -> float:
    """The weight in `metrics`; raises ValueError unless all of them are numbers in their domains."""
    numbers = {name: value if isinstance(value, list) else [value] for name, value in metrics.items()}
    if sum(map(len, numbers.values())) > MAX_METRICS:
        raise ValueError(f"its metrics are more than {MAX_METRICS} numbers")
    weight = metrics.get(rules.weight)
    low, high = rules.examples(worker)
    if not isinstance(weight, int | float) or not (weight > 0 and low <= weight <= high):
        raise ValueError(f"{rules.weight} is {printable(weight)}")
    for name in rules.metrics:
        if not isinstance(metrics.get(name), int | float):
            raise ValueError(f"{name} is {printable(metrics.get(name))}")
    for name, values in numbers.items():
        low, high = rules.metrics.get(name, ANY)
        for value in values:
            if not low <= value <= high:  # true of NaN too
                raise ValueError(f"{name} is {value}")
    return float(weight)


def not_finite(reason: str) -> bool:
    """Whether an update was left out for this `reason` because its training has diverged."""
    return reason.endswith(("is not finite", "is above 1e15", "is nan", "is inf"))


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
