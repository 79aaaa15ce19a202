"""Images as tensors on the training device, and augmented batches of them.

A pixel is stored as 32-bit words of four channels each (of red, green and blue, one word with a spare byte), inside a
border of other pixels. The random crops of a batch are then one gather of words, six times faster than gathering bytes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.task import Examples
from fedsim.registry import AUGMENTATIONS
from strategies.arguments import Choice

ImageShape = tuple[int, int, int]  # channels, height and width of the crop of an image that a model gets
CIFAR_IMAGE: ImageShape = (3, 32, 32)
Corners = tuple[int, int]  # the number of rows, and of columns, at which a crop may begin
Moments = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel, of pixel / 255


class Border(NamedTuple):
    """The pixels around an image: how many, as in the usual CIFAR augmentation, and black or the image reflected."""

    padding: int = 4
    mode: Literal["constant", "reflect"] = "constant"

    @property
    def form(self) -> object:
        """What tells cached images with this border from others."""
        return self.padding if self.mode == "constant" else self


BLACK = Border()


@dataclass(frozen=True)
class Augmentation:
    """How a batch is made of images, and the border that crops reach into."""

    random_crop: bool = True
    mirror: bool = True
    own: str = ""  # the choice of functions of one's own, which change the crops
    crop_size: int = 0  # the side of a square; 0: as large as the image
    border: Border = BLACK


USUAL = Augmentation()


class Images(Examples):
    """N labelled images on a device, in groups by their labels.

    `pixels`: (N, H, W, C) uint8, or the int32 words that `bordered` makes of them, which are not copied on the CPU and
    may be a mapped file; `labels`: (N,) integers. Batches are normalised by `moments`, and augmented as `how` says.
    """

    draws = 4  # the image, the row and the column of the crop, and whether it is mirrored

    def __init__(
        self,
        pixels: NDArray[Any],
        labels: NDArray[np.int64],
        moments: Moments,
        device: torch.device | str,
        how: Augmentation = USUAL,
    ) -> None:
        words = bordered(pixels, how.border) if pixels.dtype == np.uint8 else pixels
        _, self._height, self._width, per_pixel = words.shape
        self._words = torch.from_numpy(words).view(-1, per_pixel).to(device)
        if per_pixel == 1:  # elements are gathered faster than rows of one
            self._words = self._words.flatten()
        self._how = how
        height, width = (how.crop_size or side - 2 * how.border.padding for side in (self._height, self._width))
        self.shape: ImageShape = (len(moments[0]), height, width)
        self.corners: Corners = (self._height - height + 1, self._width - width + 1)
        self._rows = torch.arange(height, device=device)
        self._columns = torch.arange(width, device=device)
        self.labels = torch.from_numpy(labels).to(device)
        mean, deviation = torch.tensor(moments, dtype=torch.float64)
        # repeated for a row of pixels: broadcasting over three values is slow on a CPU
        self._scale = (1 / (255 * deviation)).float().repeat(width).to(device)
        self._shift = (mean / deviation).float().repeat(width).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        return self.labels.device

    @property
    def groups(self) -> Tensor:
        return self.labels

    def pixels(self) -> NDArray[np.uint8]:
        """(N, H, W, C) uint8, without border and normalisation."""
        padding = self._how.border.padding
        inside = slice(padding, -padding or None)
        words = self._words.cpu().view(-1, self._height, self._width, self._per_pixel)[:, inside, inside]
        return words.contiguous().view(torch.uint8).numpy()[..., : self.shape[0]]

    def crop(self, index: Tensor, top: Tensor, left: Tensor, flip: Tensor, replicas: int = 1) -> Tensor:
        """(B, C, H, W) normalised float32 crops of `shape`, channels-last.

        Crop i has its upper left corner at row `top[i]` and column `left[i]`, both less than `corners`, of the
        bordered image `index[i]`, and is mirrored where `flip[i]`. All four: (B,) integers.
        For K `replicas` side by side they are (K * B,), and the crops (B, K * C, H, W).
        """
        channels, height, width = self.shape
        rows = (index * self._height + top)[:, None] + self._rows
        columns = left[:, None] + torch.where(flip[:, None] != 0, width - 1 - self._columns, self._columns)
        words = (rows * self._width)[:, :, None] + columns[:, None, :]
        apart = self._words.index_select(0, words.flatten()).view(replicas, -1, height, width, self._per_pixel)
        together = apart.permute(1, 2, 3, 0, 4).flatten()
        pixels = together.view(torch.uint8).view(-1, 4 * self._per_pixel)[:, :channels]
        normalised = pixels.float().view(-1, channels * width).mul_(self._scale).sub_(self._shift)
        return normalised.view(-1, height, width, channels * replicas).permute(0, 3, 1, 2)

    def sample(self, index: NDArray[np.int64], words: NDArray[np.uint64]) -> Tensor:
        """(4, N) int64 on the CPU: the arguments of `crop` for training on the N images `index`, by N random words."""
        drawn = sample_crops(index, words, self.corners)
        if not self._how.random_crop:
            drawn[1:3] = torch.tensor(self._middle)[:, None]
        if not self._how.mirror:
            drawn[3] = 0
        return drawn

    def batch(self, drawn: Tensor, keys: Sequence[int], replicas: int = 1) -> tuple[Tensor, Tensor]:
        """Augmented crops, as of `crop`, and their labels."""
        index, top, left, flip = drawn
        return self.augmented(self.crop(index, top, left, flip, replicas), keys), self.labels.index_select(0, index)

    def augmented(self, crops: Tensor, keys: Sequence[int]) -> Tensor:
        """`crops` as the user's own functions change them, if the key augment names any.

        Each gets those of each replica, normalised, and a generator on the CPU that is seeded by the replica's key.
        """
        if not self._how.own:
            return crops
        parts = [part.contiguous(memory_format=torch.channels_last) for part in crops.chunk(len(keys), dim=1)]
        with torch.no_grad():
            for own in self._own:
                parts = [own.make(p, torch.Generator().manual_seed(k)) for p, k in zip(parts, keys, strict=True)]
        return torch.cat(parts, dim=1)

    @functools.cached_property
    def _own(self) -> list[Choice]:
        """Imported when they are used: who only reads labels needs no code of the user's."""
        return AUGMENTATIONS.read(self._how.own)

    def subset(self, index: NDArray[np.int64]) -> Images:
        """A copy of the images `index`, in that order."""
        part = copy.copy(self)
        chosen = torch.from_numpy(index).to(self.labels.device)
        part._words = self._words.view(len(self), -1)[chosen].view(-1, *self._words.shape[1:])
        part.labels = self.labels[chosen]
        return part

    def plain(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The central crops of the images `start` to `stop`, normalised but not augmented, and their labels."""
        index = torch.arange(start, min(stop, len(self)), device=self.labels.device)
        top, left = (torch.full_like(index, at) for at in self._middle)
        return self.crop(index, top, left, torch.zeros_like(index)), self.labels[index]

    @property
    def _middle(self) -> Corners:
        """The row and the column at which the central crop begins."""
        rows, columns = self.corners
        return (rows - 1) // 2, (columns - 1) // 2

    @property
    def _per_pixel(self) -> int:
        """The words of a pixel."""
        return self._words.shape[1] if self._words.ndim == 2 else 1


def images_like(count: int, shape: tuple[int, ...]) -> Tensor:
    """Black images of `shape` (C, H, W), with the strides of those that are trained on (`Images.crop`)."""
    channels, height, width = shape
    return torch.zeros(count, height, width, channels).permute(0, 3, 1, 2)


def bordered(pixels: NDArray[np.uint8], border: Border = BLACK) -> NDArray[np.int32]:
    """(N, H, W, C) pixels -> (N, H + 2 padding, W + 2 padding, words of a pixel), with their border."""
    count, height, width, channels = pixels.shape
    padding, mode = border
    words = np.zeros((count, height + 2 * padding, width + 2 * padding, 4 * -(-channels // 4)), np.uint8)
    sides = (0, 0), (padding, padding), (padding, padding), (0, 0)
    for start in range(0, count, 1000):  # in parts, to save memory
        words[start : start + 1000, ..., :channels] = np.pad(pixels[start : start + 1000], sides, mode)
    return words.view(np.int32)


def bordered_bytes(shape: tuple[int, ...], border: Border) -> int:
    """The bytes of what `bordered` makes of pixels of this `shape`."""
    count, height, width, channels = shape
    return count * (height + 2 * border.padding) * (width + 2 * border.padding) * 4 * -(-channels // 4)


def sample_crops(index: NDArray[np.int64], words: NDArray[np.uint64], corners: Corners) -> Tensor:
    """(4, N) int64 on the CPU: `index`, `top`, `left` and `flip` of `Images.crop` for the N images `index`.

    `words` are N random 64-bit words: the upper half gives `top`, the lower half `left`, the last bit `flip`.
    """
    half = np.uint64(32)
    halves = zip((words >> half, words & np.uint64(2**32 - 1)), corners, strict=True)
    top, left = (((part * np.uint64(count)) >> half).astype(np.int64) for part, count in halves)
    return torch.from_numpy(np.stack([index, top, left, (words & np.uint64(1)).astype(np.int64)]))
