"""Compressed updates: codecs for tensors.

A codec encodes a tensor as a few smaller ones, which are sent in its place, and decodes them:

    fp16, bf16   half precision
    int8, int4   uniform quantization with one scale per tensor (int4 packs two values in a byte)
    sign         the sign of each value and their mean magnitude (Bernstein et al. 2018; Karimireddy et al. 2019)
    topk         the largest `ratio` of the values by magnitude (Stich et al. 2018)
    randomk      a random `ratio` of the values, whose indices both sides draw from the same seed
    qsgd         stochastic rounding to `levels` levels of the norm of each bucket of 128 (Alistarh et al. 2017)
    powersgd     rank-`rank` factors of each matrix by one power iteration (Vogels et al. 2019), for each worker by
                 itself; vectors are sent as they are

What the server sends must decode to the same bits on every device, so decoding uses only operations that are rounded
separately, in a fixed order. Error feedback is not a codec's: see `strategies.wire`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from strategies.arguments import above, at_least, at_most, check_fields

Parts = dict[str, Tensor]  # what one tensor is encoded as
BUCKET = 128  # values of qsgd that share a norm
# Its squared error is at most BUCKET / (4 levels^2) of the update's square: with fewer levels a residual grows
QSGD_LEVELS = math.ceil((BUCKET / 4) ** 0.5)
FP16_MAX = 65504.0


class Codec:
    """Encodes one tensor. Both directions use a generator in the same state, so that random indices are not sent."""

    remembers: ClassVar[bool] = False  # whether encoding starts from the last message, see `warm_start`
    selects: ClassVar[bool] = False  # whether it sends some of the values as they are, at `places`

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def sparse(self) -> bool:
        """Whether most values of what it decodes are zero."""
        return False

    @property
    def residual_decay(self) -> float:
        """By what error feedback multiplies what earlier messages left out."""
        return 1.0

    @property
    def grows(self) -> str:
        """Why what messages leave out would grow, with the remedy; empty if it does not."""
        return ""

    def encode(self, x: Tensor, generator: torch.Generator, warm_start: Tensor | None) -> Parts:
        raise NotImplementedError

    def decode(self, parts: Mapping[str, Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def places(self, parts: Mapping[str, Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
        """The indices, in the flat tensor, of the values that are sent, where the codec `selects` them."""
        raise NotImplementedError

    def warm_start(self, parts: Parts) -> Tensor | None:
        """What the sender keeps of a message for encoding the next one."""
        return None

    def problems(self, parts: Parts, like: Tensor) -> list[tuple[str, Tensor]]:
        """Why parts of the right types and shapes may not be decodable, each with a tensor: whether it applies."""
        return []


class Half(Codec):
    """Half precision, whose bits are sent as int16 where NumPy has no such type."""

    dtype: ClassVar[torch.dtype]

    def decode(self, parts: Mapping[str, Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
        return parts["values"].view(self.dtype).to(like.dtype)


@dataclass(frozen=True)
class Fp16(Half):
    """float16, clamped to its range."""

    dtype = torch.float16

    def encode(self, x: Tensor, generator: torch.Generator, warm_start: Tensor | None) -> Parts:
        return {"values": x.clamp(-FP16_MAX, FP16_MAX).half()}


@dataclass(frozen=True)
class Bf16(Half):
    """bfloat16."""

    dtype = torch.bfloat16

    def encode(self, x: Tensor, generator: torch.Generator, warm_start: Tensor | None) -> Parts:
        return {"values": x.to(self.dtype).view(torch.int16)}


class Uniform(Codec):
    """Integers from -`largest` to `largest`, times one scale; packed two to a byte where they fit four bits."""

    largest: ClassVar[int]

    def encode(self, x: Tensor, generator: torch.Generator, warm_start: Tensor | None) -> Parts:
        scale = (x.abs().amax() / self.largest).float()
        steps = (x / scale).nan_to_num_().round_().clamp_(-self.largest, self.largest)
        return {"values": _narrow(steps.to(torch.int8), self.largest), "scale": scale}

    def decode(self, parts: Mapping[str, Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
        return _wide(parts["values"], like, self.largest).to(like.dtype) * parts["scale"]


@dataclass(frozen=True)
class Int8(Uniform):
    """Integers of eight bits and one scale for each tensor."""

    largest = 127


@dataclass(frozen=True)
class Int4(Uniform):
    """Integers of four bits and one scale for each tensor."""

    largest = 7


@dataclass(frozen=True)
class Sign(Codec):
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
class Selection(Codec):
    """A `ratio` of the values, at least one, as they are; all others decode to zero."""

    selects = True
    ratio: Annotated[float, above(0), at_most(1)] = 0.01

    @property
    def sparse(self) -> bool:
        return self.ratio < 1

    def decode(self, parts: Mapping[str, Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
        return _scattered(parts["values"], self.places(parts, like, generator), like)


@dataclass(frozen=True)
class TopK(Selection):
    """Those that are largest by magnitude, and their indices."""

    def encode(self, x: Tensor, generator: torch.Generator, warm_start: Tensor | None) -> Parts:
        flat = x.flatten()
        places = flat.abs().topk(share_of(x.numel(), self.ratio)).indices.sort().values
        return {"values": flat[places], "places": places.to(torch.int32)}

    def places(self, parts: Mapping[str, Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
        return parts["places"].to(torch.int64)

    def problems(self, parts: Parts, like: Tensor) -> list[tuple[str, Tensor]]:
        places = parts["places"].to(torch.int64)
        outside = ((places < 0) | (places >= like.numel())).any()
        descending = (places.diff() <= 0).any()
        return [("a place is outside the tensor", outside), ("its places are not ascending", descending)]


@dataclass(frozen=True)
class RandomK(Selection):
    """Random ones, whose indices both sides draw; not scaled up, since error feedback returns what is left out."""

    def encode(self, x: Tensor, generator: torch.Generator, warm_start: Tensor | None) -> Parts:
        return {"values": x.flatten()[self.places({}, x, generator)]}

    def places(self, parts: Mapping[str, Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randperm(like.numel(), generator=generator)[: share_of(like.numel(), self.ratio)].to(like.device)


@dataclass(frozen=True)
class QSGD(Codec):
    """Stochastic rounding to `levels` levels of each bucket's norm, which is unbiased."""

    levels: Annotated[int, at_least(1), at_most(127)] = 7

    @property
    def grows(self) -> str:
        few = self.levels < QSGD_LEVELS
        return f"levels = {self.levels}: what messages leave out would grow: give {QSGD_LEVELS} or more" if few else ""

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
class PowerSGD(Codec):
    """Two factors of a matrix (in a convolution, a row for each output channel) where they are smaller than it."""

    remembers = True
    rank: Annotated[int, at_least(1), at_most(10**4)] = 4

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

    def warm_start(self, parts: Parts) -> Tensor | None:
        return parts.get("right")

    def _drawn(self, matrix: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.randn(matrix.shape[1], self.rank, generator=generator)
        if matrix.device.type == "cuda":
            drawn = drawn.pin_memory()  # the copy is then not waited for
        return drawn.to(matrix.device, matrix.dtype, non_blocking=True)

    def _pays(self, x: Tensor) -> bool:
        return x.ndim > 1 and self.rank <= len(x) and self.rank * (len(x) + x[0].numel()) < x.numel()


@dataclass(frozen=True)
class Chain(Codec):
    """The values that the `first` codec sends, encoded by the `second`, as in ``topk+int8``."""

    first: Codec
    second: Codec

    def __post_init__(self) -> None:
        if not self.first.selects or self.second.selects or self.second.remembers:
            raise ValueError(
                "a chain is topk, chunked-topk or randomk, then a codec of each value: fp16, int2, sign, ..., or your "
                "own, which is given the values as a vector"
            )

    @property
    def sparse(self) -> bool:
        return self.first.sparse

    @property
    def residual_decay(self) -> float:
        return self.first.residual_decay

    @property
    def grows(self) -> str:
        return self.second.grows

    def encode(self, x: Tensor, generator: torch.Generator, warm_start: Tensor | None) -> Parts:
        parts = self.first.encode(x, generator, None)
        inner = self.second.encode(parts.pop("values"), _next(generator), None)
        return {**parts, **{f"values.{part}": tensor for part, tensor in inner.items()}}

    def decode(self, parts: Mapping[str, Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
        outer, inner = self._split(parts)
        places = self.first.places(outer, like, generator)
        values = self.second.decode(inner, like.new_empty(len(places)), _next(generator))
        return _scattered(values, places, like)

    def problems(self, parts: Parts, like: Tensor) -> list[tuple[str, Tensor]]:
        outer, inner = self._split(parts)
        return [*self.first.problems(outer, like), *self.second.problems(inner, like)]

    def _split(self, parts: Mapping[str, Tensor]) -> tuple[Parts, Parts]:
        inner = {name.removeprefix("values."): t for name, t in parts.items() if name.startswith("values.")}
        return {name: t for name, t in parts.items() if not name.startswith("values.")}, inner


def _next(generator: torch.Generator) -> torch.Generator:
    """A generator for the second codec of a chain, which may draw more when it encodes than when it decodes."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))


def _scattered(values: Tensor, places: Tensor, like: Tensor) -> Tensor:
    """A tensor shaped like `like` with `values` at `places`, and zeros elsewhere."""
    return torch.zeros_like(like).flatten().index_copy_(0, places, values).view(like.shape)


def share_of(count: int, ratio: float) -> int:
    """How many of so many values a `ratio` of them is, at least one."""
    return max(1, int(Fraction(str(ratio)) * count))  # in decimal: 0.29 of 100 is 29


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
