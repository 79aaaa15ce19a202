"""The bytes of the messages of a round, known before a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from fedsim.config import Config
from fedsim.federation.shapes import zeros_of
from fedsim.models import initial_model
from fedsim.training.methods import layers_of
from fedsim.training.workers import everyone
from strategies.method import ServerRound
from strategies.tensor_array import payload_bytes, tensor_record
from strategies.wire import encode


class RoundBytes(NamedTuple):
    """The bytes that one client sends in a round, and receives: whole, and where it was in the round before."""

    up: int
    whole: int
    down: int


def round_bytes(config: Config) -> RoundBytes:
    """The bytes of the messages of a round of `config`; clients' states, sent for checkpoints, are not counted."""
    layers, model = layers_of(config), initial_model(config.changed({"device": "cpu"}))
    zero = zeros_of(config, model)
    x, buffers = {name: value.detach() for name, value in model.named_parameters()}, zero.buffers
    besides = layers.send(ServerRound(1, everyone(config), x, x), layers.initial(zero), 0)
    whole = _bytes(x, buffers, besides)
    down = _bytes(encode(layers.wire.down, x, {}, 0)[0], buffers, besides) if layers.wire.down else whole
    return RoundBytes(_bytes(layers.wire.expected(x), buffers, layers.replies(besides, 1)), whole, down)


def _bytes(*parts: Mapping[str, Tensor]) -> int:
    return sum(payload_bytes(tensor_record(part)) for part in parts)
