"""An encoded update that does not decode, or not to finite numbers of the right shape, is left out: by every codec."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsim.federation.flower_internals import become_server
from strategies.layers import Layers
from strategies.local_sgd import Aggregate, LocalSGD
from strategies.tensor_array import tensors_of
from strategies.wire import Wire, encode
from tests.strategies.test_compression import NAMES, codec_of

X = {"fc": torch.ones(12, 20), "bias": torch.ones(3), "scale": torch.tensor(2.0)}
Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def server() -> None:
    become_server(1, 1)  # who sends the messages


def encoded(name: str) -> Arrays:
    """The message of an honest update of 1 to all values but one."""
    codec = codec_of(name, ratio=0.2, rank=2)
    update = {key: torch.full_like(value, 0.5) for key, value in X.items()}
    update["fc"][0, 0] = -1.0
    return {key: value.numpy() for key, value in encode(codec, update, {}, 7)[0].items()}


def aggregated(name: str, second: Arrays | ArrayRecord) -> Aggregate:
    """The outcome of a round of two workers, of whom the first is honest and the second sends `second`."""
    codec = codec_of(name, ratio=0.2, rank=2)
    strategy = LocalSGD(layers=Layers(wire=Wire(codec, seed=lambda round_, worker: 7)))
    x = record({key: value.numpy() for key, value in X.items()})
    request = strategy.request(1, x, ConfigRecord(), {2: 0, 3: 1})
    replies = []
    for message, arrays in zip(request.messages, (encoded(name), second), strict=True):
        sent = arrays if isinstance(arrays, ArrayRecord) else record(arrays)
        content = RecordDict({"arrays": sent, "metrics": MetricRecord({"num-examples": 1})})
        replies.append(Message(content, reply_to=message))
    return strategy.aggregate(1, request, replies, {})


def record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in arrays.items()})


def parameters(outcome: Aggregate) -> dict[str, Tensor]:
    assert outcome.arrays is not None
    return tensors_of(outcome.arrays)


def first(arrays: Arrays) -> str:
    return min(arrays)


def infinite(value: np.ndarray) -> np.ndarray:
    """All of it infinite: bf16 as its bits, a tensor of bits alone as it is."""
    if value.dtype == np.int16:
        return np.full_like(value, 0x7F80)
    return np.full_like(value, np.inf) if value.dtype.kind == "f" else value


GARBLED: dict[str, tuple[Callable[[Arrays], Arrays], str]] = {
    "a part is missing": (lambda a: {key: a[key] for key in a if key != first(a)}, "its arrays differ from those"),
    "a part too many": (lambda a: {**a, "fc/spam": np.zeros(3)}, "its arrays differ from those sent: fc/spam"),
    "another type": (lambda a: {**a, first(a): a[first(a)].astype(np.float64)}, "is float64 "),
    "another shape": (lambda a: {**a, first(a): np.append(a[first(a)], a[first(a)].flat[0])}, r"not as it was sent"),
    "infinite": (lambda a: {key: infinite(value) for key, value in a.items()}, "is not finite"),
    "not compressed": (lambda a: {key: value.numpy() for key, value in X.items()}, "its arrays differ from those"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_garbled_update_is_left_out_and_changes_nothing(name: str) -> None:
    alone = parameters(aggregated(name, ArrayRecord()))
    for what, (garble, reason) in GARBLED.items():
        outcome = aggregated(name, garble(encoded(name)))
        assert list(outcome.averaged) == [0], what
        assert reason in outcome.left_out[1], what
        assert all(torch.equal(value, alone[key]) for key, value in parameters(outcome).items()), what
    cut = record(encoded(name))
    key = min(cut)
    cut[key] = Array(cut[key].dtype, cut[key].shape, cut[key].stype, cut[key].data[:-1])
    assert "cannot be read" in aggregated(name, cut).left_out[1]


def any_bits(like: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.frombuffer(rng.bytes(like.nbytes), like.dtype).reshape(like.shape)


def any_finite(like: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Numbers of any size that the type has."""
    if like.dtype.kind != "f":
        return any_bits(like, rng)
    limits = np.finfo(like.dtype)
    powers = rng.uniform(limits.minexp, limits.maxexp, like.shape)
    return np.asarray(rng.choice([-1.0, 1.0], like.shape) * 2.0**powers).astype(like.dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("draw", [any_bits, any_finite])
def test_whatever_the_parts_hold_the_model_stays_finite(
    name: str, draw: Callable[[np.ndarray, np.random.Generator], np.ndarray]
) -> None:
    """Right in names, types and shapes, an update is averaged, or left out with a reason."""
    for seed in range(15):
        rng = np.random.default_rng(seed)
        outcome = aggregated(name, {key: draw(value, rng) for key, value in encoded(name).items()})
        assert (list(outcome.averaged) == [0, 1]) == (outcome.left_out == {})
        after = parameters(outcome)
        assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in X.items()}
        assert all(value.isfinite().all() for value in after.values())


@pytest.mark.parametrize("places", [[-1, 2], [2, 240], [3, 3], [3, 2]])
def test_places_must_be_ascending_and_within_the_tensor(places: list[int]) -> None:
    arrays = encoded("topk")
    arrays["fc/places"][:2] = places
    arrays["fc/places"][2:] = range(max(places) + 1, max(places) + len(arrays["fc/places"]) - 1)
    reason = aggregated("topk", arrays).left_out[1]
    assert reason == ("its places are not ascending" if places[0] == 3 else "a place is outside the tensor")
