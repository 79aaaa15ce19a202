"""The bytes of the messages of each round, known before a run."""

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
    """The bytes that one client sends in a round, and receives."""

    up: int
    down: int


class Messages(NamedTuple):
    """The messages of one client in the rounds of a run, which after the first `period` rounds repeat themselves."""

    period: int
    first: list[RoundBytes]  # of twice as many rounds

    def in_round(self, round_: int) -> RoundBytes:
        """Those of a round, of a client that was in the round before."""
        return self.first[round_ - 1 if round_ <= self.period else self.period + (round_ - 1) % self.period]

    @property
    def later(self) -> tuple[float, float]:
        """The mean bytes up and down in a round that is not among the first."""
        ups, downs = zip(*self.first[self.period :], strict=True)
        return sum(ups) / self.period, sum(downs) / self.period


def messages_of(config: Config) -> Messages:
    """The messages of a run of `config`; clients' states, sent for checkpoints, are not counted."""
    layers, model = layers_of(config), initial_model(config.changed({"device": "cpu"}))
    zero = zeros_of(config, model)
    x, buffers, state = {n: v.detach() for n, v in model.named_parameters()}, zero.buffers, layers.initial(zero)

    def in_round(round_: int) -> RoundBytes:
        besides = layers.send(ServerRound(round_, everyone(config), x, x), state, 0)
        sent = layers.down(round_, x) if round_ > 1 else x
        if layers.wire.down and round_ > 1:
            sent = encode(layers.wire.down, sent, {}, 0)[0]
        reply = layers.wire.expected(layers.up(round_, x))
        return RoundBytes(
            _bytes(reply, buffers, layers.replies(besides, round_, state)), _bytes(sent, buffers, besides)
        )

    return Messages(layers.period, [in_round(round_) for round_ in range(1, 2 * layers.period + 1)])


def _bytes(*parts: Mapping[str, Tensor]) -> int:
    return sum(payload_bytes(tensor_record(part)) for part in parts)
