"""Compressed updates: codecs for tensors, and error feedback around any of them.

A codec encodes a tensor as a few smaller ones, which are sent in its place, and decodes them:

    fp16, bf16   half precision
    int8, int4   uniform quantization with one scale per tensor (int4 packs two values in a byte)
    sign         the sign of each value and their mean magnitude (Bernstein et al. 2018; Karimireddy et al. 2019)
    topk         the largest `ratio` of the values by magnitude (Stich et al. 2018)
    randomk      a random `ratio` of the values, whose indices both sides draw from the same seed
    qsgd         stochastic rounding to `levels` levels of the norm of each bucket of 128 (Alistarh et al. 2017)
    powersgd     rank-`rank` factors of each matrix by one power iteration (Vogels et al. 2019), for each worker by
                 itself; vectors are sent as they are

With error feedback (Seide et al. 2014) a worker adds what the last message left out to the next one. The server may
compress what it sends too (`broadcast`). Its message must decode to the same bits on every device, so decoding uses
only operations that are rounded separately, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from strategies.sections import with_prefix

Parts = dict[str, Tensor]  # what one tensor is encoded as
BUCKET = 128  # values of qsgd that share a norm
FP16_MAX = 65504.0
RESIDUAL, WARM_START = "residual/", "warm-start/"  # prefixes of a worker's state
HELD = "held/"  # prefix of the server's state: the parameters that workers hold


class Codec(Protocol):
    """Encodes one tensor. Both directions use a generator in the same state, so that random indices are not sent."""

    def encode(self, x: Tensor, generator: torch.Generator, warm_start: Tensor | None) -> Parts: ...

    def decode(self, parts: Mapping[str, Tensor], like: Tensor, generator: torch.Generator) -> Tensor: ...


@dataclass(frozen=True)
class Half:
    """fp16 (clamped to its range) or bf16, whose bits are sent as int16: NumPy has no bf16."""

    dtype: torch.dtype

    def encode(self, x: Tensor, generator: torch.Generator, warm_start: Tensor | None) -> Parts:
        if self.dtype == torch.float16:
            return {"values": x.clamp(-FP16_MAX, FP16_MAX).half()}
        return {"values": x.to(self.dtype).view(torch.int16)}

    def decode(self, parts: Mapping[str, Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
        return parts["values"].view(self.dtype).to(like.dtype)


@dataclass(frozen=True)
class Uniform:
    """Integers from -`largest` to `largest`, times one scale; packed two to a byte where they fit four bits."""

    largest: int

    def encode(self, x: Tensor, generator: torch.Generator, warm_start: Tensor | None) -> Parts:
        scale = (x.abs().amax() / self.largest).float()
        steps = (x / scale).nan_to_num_().round_().clamp_(-self.largest, self.largest)
        return {"values": _narrow(steps.to(torch.int8), self.largest), "scale": scale}

    def decode(self, parts: Mapping[str, Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
        return _wide(parts["values"], like, self.largest).to(like.dtype) * parts["scale"]


@dataclass(frozen=True)
class Sign:
    """One bit a value (0 counts as positive) and the mean magnitude."""

    def encode(self, x: Tensor, generator: torch.Generator, warm_start: Tensor | None) -> Parts:
        flat = x.flatten()  # the same order in every memory layout, which the sum depends on
        bits = F.pad(flat >= 0, (0, -x.numel() % 8)).view(-1, 8)
        places = 2 ** torch.arange(8, device=x.device)
        return {"bits": (bits * places).sum(1).to(torch.uint8), "scale": flat.abs().mean().float()}

    def decode(self, parts: Mapping[str, Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
        places = 2 ** torch.arange(8, device=like.device)
        bits = (parts["bits"][:, None].to(torch.int64) & places).flatten()[: like.numel()] != 0
        return torch.where(bits, parts["scale"], -parts["scale"]).to(like.dtype).view(like.shape)


@dataclass(frozen=True)
class TopK:
    """The `ratio` of the values that is largest by magnitude, at least one, and their indices."""

    ratio: float

    def encode(self, x: Tensor, generator: torch.Generator, warm_start: Tensor | None) -> Parts:
        flat = x.flatten()
        places = flat.abs().topk(_count(x, self.ratio)).indices.sort().values
        return {"values": flat[places], "places": places.to(torch.int32)}

    def decode(self, parts: Mapping[str, Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
        places = parts["places"].to(torch.int64)
        return torch.zeros_like(like).flatten().index_copy_(0, places, parts["values"]).view(like.shape)


@dataclass(frozen=True)
class RandomK:
    """A random `ratio` of the values, at least one; not scaled up, since error feedback returns what is left out."""

    ratio: float

    def encode(self, x: Tensor, generator: torch.Generator, warm_start: Tensor | None) -> Parts:
        return {"values": x.flatten()[self._places(x, generator)]}

    def decode(self, parts: Mapping[str, Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
        places = self._places(like, generator)
        return torch.zeros_like(like).flatten().index_copy_(0, places, parts["values"]).view(like.shape)

    def _places(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randperm(x.numel(), generator=generator)[: _count(x, self.ratio)].to(x.device)


@dataclass(frozen=True)
class QSGD:
    """Stochastic rounding to `levels` levels of each bucket's norm, which is unbiased."""

    levels: int

    def encode(self, x: Tensor, generator: torch.Generator, warm_start: Tensor | None) -> Parts:
        buckets = F.pad(x.flatten(), (0, -x.numel() % BUCKET)).view(-1, BUCKET)
        norms = buckets.norm(dim=1).float()
        positions = (buckets.abs() / norms[:, None] * self.levels).nan_to_num_()
        chance = torch.rand(positions.shape, generator=generator, dtype=torch.float64).to(x.device)
        steps = (positions + chance).floor_().clamp_(max=self.levels) * buckets.sign()
        return {"values": _narrow(steps.to(torch.int8), self.levels), "norms": norms}

    def decode(self, parts: Mapping[str, Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
        norms = parts["norms"]
        steps = _wide(parts["values"], like.new_empty(len(norms), BUCKET), self.levels)
        values = steps.to(like.dtype) * (norms[:, None] / self.levels)
        return values.flatten()[: like.numel()].view(like.shape).to(like.dtype)


@dataclass(frozen=True)
class PowerSGD:
    """Two factors of a matrix (in a convolution, a row for each output channel) where they are smaller than it."""

    rank: int

    def encode(self, x: Tensor, generator: torch.Generator, warm_start: Tensor | None) -> Parts:
        if not self._pays(x):
            return {"values": x}
        matrix = x.flatten(1)
        right = self._drawn(matrix, generator)
        if warm_start is not None:  # a column of zeros would stay so, for instance after an update of zero
            right = torch.where((warm_start == 0).all(0), right, warm_start)
        left = torch.linalg.qr(matrix @ right).Q
        return {"left": left, "right": matrix.T @ left}

    def decode(self, parts: Mapping[str, Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
        if not self._pays(like):
            return parts["values"]
        product = torch.zeros_like(parts["left"][:, :1] * parts["right"][:, 0])
        for column, row in zip(parts["left"].T, parts["right"].T, strict=True):
            product += column[:, None] * row  # a matrix product is rounded differently on other devices
        return product.view(like.shape)

    def _drawn(self, matrix: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.randn(matrix.shape[1], self.rank, generator=generator)
        if matrix.device.type == "cuda":
            drawn = drawn.pin_memory()  # the copy is then not waited for
        return drawn.to(matrix.device, matrix.dtype, non_blocking=True)

    def _pays(self, x: Tensor) -> bool:
        return x.ndim > 1 and self.rank <= len(x) and self.rank * (len(x) + x[0].numel()) < x.numel()


def make_codec(name: str, ratio: float = 0.01, levels: int = 7, rank: int = 4) -> Codec | None:
    """The codec of a name in `CODECS`; None for ``none``."""
    return _codecs(ratio, levels, rank)[name]


def _codecs(ratio: float, levels: int, rank: int) -> dict[str, Codec | None]:
    return {
        "none": None,
        "fp16": Half(torch.float16),
        "bf16": Half(torch.bfloat16),
        "int8": Uniform(127),
        "int4": Uniform(7),
        "sign": Sign(),
        "topk": TopK(ratio),
        "randomk": RandomK(ratio),
        "qsgd": QSGD(levels),
        "powersgd": PowerSGD(rank),
    }


CODECS = tuple(_codecs(ratio=1, levels=1, rank=1))


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
        corrected = value + memory[RESIDUAL + name] if RESIDUAL + name in memory else value
        parts = codec.encode(corrected, generators[0], memory.get(WARM_START + name))
        message |= {f"{name}/{part}": tensor for part, tensor in parts.items()}
        if feedback:
            remembered[RESIDUAL + name] = corrected - codec.decode(parts, corrected, generators[1])
        if "right" in parts:
            remembered[WARM_START + name] = parts["right"]
    return message, remembered


def decode(codec: Codec, message: Mapping[str, Tensor], like: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The update in a `message`, shaped like `like`. `why_undecodable` is to check a message from elsewhere first."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, Parts] = {name: {} for name in like}
    for key, tensor in message.items():
        name, _, part = key.rpartition("/")
        parts[name][part] = tensor
    return {name: codec.decode(parts[name], value, generator) for name, value in like.items()}


def why_undecodable(messages: Sequence[Mapping[str, Tensor]], like: Mapping[str, Tensor]) -> list[str]:
    """Why each of `messages`, whose names, types and shapes are right, cannot be decoded, or "".

    Only the places of topk can be wrong. A GPU is waited for once, for all `messages`.
    """
    found: list[tuple[int, str, Tensor]] = []  # a message, a reason, and whether it applies
    for i, message in enumerate(messages):
        for name, value in like.items():
            if f"{name}/places" in message:
                places = message[f"{name}/places"].to(torch.int64)
                outside = ((places < 0) | (places >= value.numel())).any()
                found.append((i, "a place is outside the tensor", outside))
                found.append((i, "its places are not ascending", (places.diff() <= 0).any()))
    reasons = [""] * len(messages)
    applies = torch.stack([condition for *_, condition in found]).tolist() if found else []
    for (i, reason, _), wrong in zip(found, applies, strict=True):
        if wrong:
            reasons[i] = reasons[i] or reason
    return reasons


class Broadcast(NamedTuple):
    """What the server sends to begin a round: a message to workers that hold the last parameters, all to the others."""

    parameters: dict[str, Tensor]  # that all workers then hold
    message: dict[str, Tensor]  # ``NAME/PART`` -> tensor; {} in the first round
    state: dict[str, Tensor]  # of the server, for the next broadcast


def broadcast(codec: Codec, x: Mapping[str, Tensor], state: Mapping[str, Tensor], seed: int) -> Broadcast:
    """Encode the parameters `x` for workers as the change from those that they hold.

    This is EF21-P (Gruntkowska, Tyurin and Richtárik 2023): the next change contains what a message leaves out, which
    is the server's error feedback. `state` is {} before the first round, in which workers get `x` itself. `receive`
    needs the same `seed`.
    """
    held = {name: state[HELD + name] for name in x if HELD + name in state}
    message: dict[str, Tensor] = {}
    remembered: dict[str, Tensor] = {}
    if held:
        change = {name: value - held[name] for name, value in x.items()}
        message, remembered = encode(codec, change, state, seed, feedback=False)
    after = receive(codec, held, message, seed) if held else dict(x)
    return Broadcast(after, message, {**with_prefix(HELD, after), **remembered})


def receive(codec: Codec, held: Mapping[str, Tensor], message: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The parameters of a worker that holds `held`, after a `message` of `broadcast`."""
    change = decode(codec, message, held, seed)
    return {name: value + change[name] for name, value in held.items()}


def _count(x: Tensor, ratio: float) -> int:
    return max(1, int(Fraction(str(ratio)) * x.numel()))  # in decimal: 0.29 of 100 is 29


def _narrow(steps: Tensor, largest: int) -> Tensor:
    """The int8 tensor `steps`, or two of its values to a byte where `largest` fits four bits."""
    if largest > 7:
        return steps
    nibbles = F.pad((steps.flatten() + 8).to(torch.uint8), (0, steps.numel() % 2)).view(-1, 2)
    return nibbles[:, 0] | (nibbles[:, 1] << 4)


def _wide(packed: Tensor, like: Tensor, largest: int) -> Tensor:
    """The inverse of `_narrow`, shaped like `like`."""
    if largest > 7:
        return packed.view(like.shape)
    nibbles = torch.stack([packed & 15, packed >> 4], dim=1).flatten()[: like.numel()]
    return (nibbles.to(torch.int8) - 8).view(like.shape)
