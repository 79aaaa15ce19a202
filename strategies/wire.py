"""The wire between the server and the workers: models as they are, or encoded, with error feedback around any codec.

With error feedback (Seide et al. 2014) a worker adds what the last message left out to the next one. The server may
send a part of the model, or compress it (`broadcast`): its message must decode to the same bits on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from strategies.compression import Codec, Parts
from strategies.method import Tensors, Zeros, zeros_like
from strategies.sections import beside, under_prefix, with_prefix

WIRE = "wire"  # the owner of what the wire keeps
RESIDUAL, WARM_START = "residual/", "warm-start/"  # prefixes of what a worker keeps, and of the server's state
HELD = "held/"  # prefix in the server's state: the parameters that workers hold
MODEL = "model/"  # prefix of what a worker keeps: the parameters that it began its round from; the server has them too


@dataclass(frozen=True)
class Wire:
    """The codecs of the workers' updates (`up`) and of the server's changes (`down`), or None.

    `seed(round, worker)` seeds what encoding and decoding a worker's message draw, or the server's (None). Without
    `feedback` what an update leaves out is lost.
    """

    up: Codec | None = None
    down: Codec | None = None
    feedback: bool = True
    seed: Callable[[int, int | None], int] = lambda round_, worker: 0

    @property
    def keeps_memory(self) -> bool:
        """Whether a worker keeps anything of what it has sent."""
        return self.up is not None and (self.feedback or self.up.remembers)

    def keeps(self, zero: Zeros) -> Tensors:
        """Zeros shaped like what a worker keeps, without the model that the server has too."""
        return encode(self.up, zero.parameters, {}, 0, self.feedback)[1] if self.up else {}

    def receive(self, round_: int, own: Mapping[str, Tensor], message: Mapping[str, Tensor]) -> Tensors:
        """The parameters of a worker after the server's `message`: some, or the encoded change, of those it keeps."""
        held = beside(message, under_prefix(MODEL, own))
        return receive(self.down, held, message, self.seed(round_, None))

    def reply(
        self, round_: int, worker: int, begun: Tensors, y: Tensors, own: Mapping[str, Tensor]
    ) -> tuple[Tensors, Tensors]:
        """What a worker sends of `y`, all or some of its parameters, and what it keeps of it."""
        if self.up is None:
            return y, {}
        update = {name: value.to(y[name].device) - y[name] for name, value in begun.items() if name in y}
        message, remembered = encode(self.up, update, beside(y, own), self.seed(round_, worker), self.feedback)
        if len(y) == len(begun):
            return message, remembered
        before = {name: value for name, value in own.items() if not name.startswith(MODEL)}
        nothing = encode(self.up, zeros_like(begun), {}, 0, self.feedback)[1] if not before else {}
        return message, {**nothing, **before, **remembered}

    def expected(self, begun: Tensors) -> Tensors:
        """Tensors with the names, types and shapes that a worker's message of its parameters must have."""
        return encode(self.up, zeros_like(begun), {}, 0, feedback=False)[0] if self.up else begun


def memory_of_holder(state: Mapping[str, Tensor]) -> Tensors:
    """What a worker that holds the last model keeps of it, from the server's `state` of the wire."""
    return with_prefix(MODEL, under_prefix(HELD, state))


def without_model(memory: Mapping[str, Tensor]) -> Tensors:
    """A worker's memory, ``OWNER/TENSOR``, without the model that the server has too."""
    return {name: value for name, value in memory.items() if not name.startswith(f"{WIRE}/{MODEL}")}


def encode(
    codec: Codec, update: Mapping[str, Tensor], memory: Mapping[str, Tensor], seed: int, feedback: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The message of a worker's `update`, as ``NAME/PART`` -> tensor, and the worker's next `memory`.

    With error `feedback` it holds the residual, what the message leaves out, which is added to the next update. No
    input is changed. `decode` needs the same `seed`.
    """
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    message: dict[str, Tensor] = {}
    remembered: dict[str, Tensor] = {}
    for name, value in update.items():
        corrected = value
        if RESIDUAL + name in memory:
            left_out = memory[RESIDUAL + name]
            corrected = value + (left_out if codec.residual_decay == 1 else codec.residual_decay * left_out)
        parts = codec.encode(corrected, generators[0], memory.get(WARM_START + name))
        message |= {f"{name}/{part}": tensor for part, tensor in parts.items()}
        if feedback:
            remembered[RESIDUAL + name] = corrected - codec.decode(parts, corrected, generators[1])
        warm_start = codec.warm_start(parts)
        if warm_start is not None:
            remembered[WARM_START + name] = warm_start
    return message, remembered


def decode(codec: Codec, message: Mapping[str, Tensor], like: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The update in a `message`, shaped like `like`. `why_undecodable` is to check a message from elsewhere first."""
    generator = torch.Generator().manual_seed(seed)
    parts = _parts(message, like)
    return {name: codec.decode(parts[name], value, generator) for name, value in like.items()}


def why_undecodable(codec: Codec, messages: Sequence[Mapping[str, Tensor]], like: Mapping[str, Tensor]) -> list[str]:
    """Why each of `messages`, whose names, types and shapes are right, cannot be decoded, or "".

    A GPU is waited for once, for all `messages`.
    """
    found = [
        (i, reason, applies)
        for i, message in enumerate(messages)
        for name, parts in _parts(message, like).items()
        for reason, applies in codec.problems(parts, like[name])
    ]
    reasons = [""] * len(messages)
    applies = torch.stack([condition for *_, condition in found]).tolist() if found else []
    for (i, reason, _), wrong in zip(found, applies, strict=True):
        if wrong:
            reasons[i] = reasons[i] or reason
    return reasons


def _parts(message: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Parts]:
    """The parts of each tensor in a message."""
    parts: dict[str, Parts] = {name: {} for name in like}
    for key, tensor in message.items():
        name, _, part = key.rpartition("/")
        parts[name][part] = tensor
    return parts


class Broadcast(NamedTuple):
    """What the server sends to begin a round: a message to workers that hold the last parameters, all to the others."""

    parameters: dict[str, Tensor]  # that all workers then hold
    message: dict[str, Tensor] | None  # NAME, or where it is encoded ``NAME/PART`` -> tensor; None in the first round
    state: dict[str, Tensor]  # of the server, for the next broadcast


def broadcast(
    codec: Codec | None,
    x: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    seed: int,
    names: Collection[str] | None = None,
) -> Broadcast:
    """Send `names` of the parameters `x` (by default all) to workers that hold others, as they are or encoded.

    Encoded is the change from those that they hold. This is EF21-P (Gruntkowska, Tyurin and Richtárik 2023): the next
    change contains what a message leaves out, which is the server's error feedback. `state` is {} before the first
    round, in which workers get `x` itself. `receive` needs the same `seed`.
    """
    held = {name: state[HELD + name] for name in x if HELD + name in state}
    if not held:
        return Broadcast(dict(x), None, with_prefix(HELD, x))
    message = {name: value for name, value in x.items() if names is None or name in names}
    remembered: dict[str, Tensor] = {}
    if codec:
        change = {name: value - held[name] for name, value in message.items()}
        message, remembered = encode(codec, change, state, seed, feedback=False)
    after = receive(codec, held, message, seed)
    return Broadcast(after, message, {**state, **with_prefix(HELD, after), **remembered})


def receive(
    codec: Codec | None, held: Mapping[str, Tensor], message: Mapping[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """The parameters of a worker that holds `held`, after a `message` of `broadcast`."""
    if codec is None:
        return {**held, **message}
    sent = {key.rpartition("/")[0] for key in message}
    change = decode(codec, message, {name: value for name, value in held.items() if name in sent}, seed)
    return {name: value + change[name] if name in change else value for name, value in held.items()}
