"""Images as tensors on the training device, and augmented batches of them.

An image is stored as one 32-bit word per pixel (red, green, blue and a spare byte), inside a border of black
pixels. The random crops of a batch are then one gather of words, six times faster than gathering bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIDE = 32  # pixels
PAD = 4  # black pixels around an image, as in the usual CIFAR augmentation
WIDTH = SIDE + 2 * PAD

Moments = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel, of pixel / 255


class Images:
    """N labelled images on a device.

    `pixels`: (N, 32, 32, 3) uint8; `labels`: (N,) integers; batches are normalised by `moments`.
    """

    def __init__(
        self, pixels: NDArray[np.uint8], labels: NDArray[np.int64], moments: Moments, device: torch.device | str
    ) -> None:
        self._set(bordered(pixels), labels, moments, device)

    @classmethod
    def of_words(
        cls, words: NDArray[np.int32], labels: NDArray[np.int64], moments: Moments, device: torch.device | str
    ) -> Images:
        """Images from the `words` of `bordered`; on the CPU these are not copied, and may be a mapped file."""
        images = cls.__new__(cls)
        images._set(words, labels, moments, device)
        return images

    def _set(
        self, words: NDArray[np.int32], labels: NDArray[np.int64], moments: Moments, device: torch.device | str
    ) -> None:
        self._words = torch.from_numpy(words).flatten().to(device)
        self._within = torch.arange(SIDE, device=device)
        self.labels = torch.from_numpy(labels).to(device)
        mean, deviation = torch.tensor(moments, dtype=torch.float64)
        # repeated for a whole row of pixels: broadcasting over three values is slow on a CPU
        self._scale = (1 / (255 * deviation)).float().repeat(SIDE).to(device)
        self._shift = (mean / deviation).float().repeat(SIDE).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self) -> NDArray[np.uint8]:
        """(N, 32, 32, 3) uint8, without border and normalisation."""
        bordered = self._words.cpu().view(torch.uint8).view(-1, WIDTH, WIDTH, 4).numpy()
        return bordered[:, PAD:-PAD, PAD:-PAD, :3]

    def crop(self, index: Tensor, top: Tensor, left: Tensor, flip: Tensor, replicas: int = 1) -> Tensor:
        """(B, 3, 32, 32) normalised float32 crops, channels-last.

        Crop i begins `top[i]` pixels from above and `left[i]` from the left (0 to 8; 4 is the image itself) in the
        black border of image `index[i]`, and is mirrored where `flip[i]`. All four: (B,) integers.
        For K `replicas` side by side they are (K * B,), and the crops (B, K * 3, 32, 32).
        """
        rows = (index * WIDTH + top)[:, None] + self._within
        columns = left[:, None] + torch.where(flip[:, None] != 0, SIDE - 1 - self._within, self._within)
        words = (rows * WIDTH)[:, :, None] + columns[:, None, :]
        apart = self._words.index_select(0, words.flatten()).view(replicas, -1, SIDE, SIDE)
        pixels = apart.permute(1, 2, 3, 0).flatten().view(torch.uint8).view(-1, 4)[:, :3]
        normalised = pixels.float().view(-1, 3 * SIDE).mul_(self._scale).sub_(self._shift)
        return normalised.view(-1, SIDE, SIDE, 3 * replicas).permute(0, 3, 1, 2)

    def subset(self, index: NDArray[np.int64]) -> Images:
        """A copy of the images `index`, in that order."""
        part = copy.copy(self)
        chosen = torch.from_numpy(index).to(self.labels.device)
        part._words = self._words.view(len(self), -1)[chosen].flatten()
        part.labels = self.labels[chosen]
        return part

    def plain(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Images and labels `start` to `stop` in order, normalised, not augmented."""
        index = torch.arange(start, min(stop, len(self)), device=self.labels.device)
        middle = torch.full_like(index, PAD)
        return self.crop(index, middle, middle, torch.zeros_like(index)), self.labels[index]


def bordered(pixels: NDArray[np.uint8]) -> NDArray[np.int32]:
    """(N, 32, 32, 3) pixels -> (N, 40, 40) words, with a black border."""
    words = np.zeros((len(pixels), WIDTH, WIDTH, 4), np.uint8)
    words[:, PAD:-PAD, PAD:-PAD, :3] = pixels
    return words.view(np.int32)[..., 0]


def sample_crops(index: NDArray[np.int64], words: NDArray[np.uint64]) -> Tensor:
    """(4, N) int64 on the CPU: `index`, `top`, `left` and `flip` of `Images.crop` for the N images `index`.

    `words` are N random 64-bit words: the upper half gives `top`, the lower half `left`, the last bit `flip`.
    """
    half, corners = np.uint64(32), np.uint64(2 * PAD + 1)
    top, left = (((part * corners) >> half).astype(np.int64) for part in (words >> half, words & np.uint64(2**32 - 1)))
    return torch.from_numpy(np.stack([index, top, left, (words & np.uint64(1)).astype(np.int64)]))


def batches(images: Images, drawn: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented batches of the crops that `sample_crops` has `drawn`.

    Yields ((B, 3, 32, 32) float32, (B,) labels); the last batch is smaller if batch_size does not divide their number.
    """
    chosen, top, left, flip = drawn.to(images.labels.device)
    for start in range(0, len(chosen), batch_size):
        part = slice(start, start + batch_size)
        yield images.crop(chosen[part], top[part], left[part], flip[part]), images.labels[chosen[part]]
