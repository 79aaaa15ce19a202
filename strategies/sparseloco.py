"""SparseLoCo's codecs (Sarfi et al. 2025, arXiv 2508.15706), as in the authors' code: `chunked-topk`, then `int2`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from strategies.arguments import above, at_least, at_most
from strategies.compression import Codec, Parts, Selection, share_of

SIGMAS, LEVELS = 6, 4  # Int2 has so many levels over so many standard deviations
BITS = (0, 2, 4, 6)  # by which the four values in a byte are shifted


@dataclass(frozen=True)
class ChunkedTopK(Selection):
    """Of each `chunk` of values those that are largest by magnitude, and their places in it, in one or two bytes.

    With error feedback, `decay` times what earlier messages left out is added to the next one.
    """

    ratio: Annotated[float, above(0), at_most(1)] = 0.015625
    chunk: Annotated[int, at_least(1), at_most(2**15)] = 4096
    decay: Annotated[float, at_least(0), at_most(1)] = 0.95

    @property
    def residual_decay(self) -> float:
        return self.decay

    def encode(self, x: Tensor, generator: torch.Generator, warm_start: Tensor | None) -> Parts:
        values, places = [], []
        for chunks in self._chunks(x.flatten()):
            within = chunks.abs().topk(share_of(chunks.shape[1], self.ratio)).indices.sort().values
            values.append(chunks.gather(1, within).flatten())
            places.append(within.flatten())
        kind = torch.uint8 if self.chunk <= 2**8 else torch.int16
        return {"values": torch.cat(values), "places": torch.cat(places).to(kind)}

    def places(self, parts: Mapping[str, Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
        starts, _ = self._of_selected(like)
        return starts + parts["places"].to(torch.int64)

    def problems(self, parts: Parts, like: Tensor) -> list[tuple[str, Tensor]]:
        within, (starts, lengths) = parts["places"].to(torch.int64), self._of_selected(like)
        outside = ((within < 0) | (within >= lengths)).any()
        descending = ((starts + within).diff() <= 0).any()
        return [("a place is outside its chunk", outside), ("its places are not ascending", descending)]

    def _of_selected(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Where the chunk of each value that is selected begins, and its length."""
        starts, lengths = [], []
        for chunks in self._chunks(torch.arange(like.numel(), device=like.device)):
            count = share_of(chunks.shape[1], self.ratio)
            starts.append(chunks[:, 0].repeat_interleave(count))
            lengths.append(torch.full_like(starts[-1], chunks.shape[1]))
        return torch.cat(starts), torch.cat(lengths)

    def _chunks(self, flat: Tensor) -> list[Tensor]:
        """The chunks of a vector as rows and, where it is no multiple of one, a shorter row with the rest."""
        whole = len(flat) // self.chunk * self.chunk
        return [part for part in (flat[:whole].view(-1, self.chunk), flat[None, whole:]) if part.numel()]


@dataclass(frozen=True)
class Int2(Codec):
    """Four levels in two bits: the means of the values in four bins around their mean."""

    def encode(self, x: Tensor, generator: torch.Generator, warm_start: Tensor | None) -> Parts:
        flat = x.flatten()
        mean = flat.mean()
        centered = flat - mean
        scale = centered.norm() * (SIGMAS / LEVELS / math.sqrt(max(1, len(flat) - 1)))
        bins = (centered / scale).nan_to_num_().add_(LEVELS // 2).round_().clamp_(0, LEVELS - 1).to(torch.uint8)
        members = [bins == level for level in range(LEVELS)]
        levels = torch.stack([torch.where(of, centered, 0).sum() / of.sum().clamp(min=1) for of in members])
        four = F.pad(bins, (0, -len(flat) % len(BITS))).view(-1, len(BITS))
        shifts = torch.tensor(BITS, dtype=torch.uint8, device=x.device)
        return {"values": (four << shifts).sum(1).to(torch.uint8), "levels": (levels + mean).float()}

    def decode(self, parts: Mapping[str, Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
        shifts = torch.tensor(BITS, dtype=torch.uint8, device=like.device)
        bins = ((parts["values"][:, None] >> shifts) & (LEVELS - 1)).flatten()[: like.numel()]
        return parts["levels"].to(like.dtype)[bins.to(torch.int64)].view(like.shape)
