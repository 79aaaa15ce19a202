"""Images as tensors on the training device: CIFAR-100 and a synthetic set, shards, augmented batches.

An image is kept as 32-bit words, one a pixel (red, green, blue and a spare byte), inside a border of black
pixels. A random crop of a whole batch is then one gather of words, six times faster than gathering bytes.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.cifar100 import official_files, read_official
from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.image_cache import Arrays, cached, user_cache
from fedsim.streams import numpy_stream

SIDE = 32  # pixels
PAD = 4  # black pixels around an image, as in the usual CIFAR augmentation
WIDTH = SIDE + 2 * PAD
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
SPLITS = ("train", "test")

Moments = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel, of pixel / 255


class Images:
    """N labelled images on a device.

    `pixels`: (N, 32, 32, 3) uint8; `labels`: (N,) integers; batches are normalised by `moments`.
    """

    def __init__(
        self, pixels: NDArray[np.uint8], labels: NDArray[np.int64], moments: Moments, device: torch.device | str
    ) -> None:
        self._hold(bordered(pixels), labels, moments, device)

    @classmethod
    def of_words(
        cls, words: NDArray[np.int32], labels: NDArray[np.int64], moments: Moments, device: torch.device | str
    ) -> Images:
        """The images that `bordered` made `words` of; on the CPU they stay where they are, a file for instance."""
        images = cls.__new__(cls)
        images._hold(words, labels, moments, device)
        return images

    def _hold(
        self, words: NDArray[np.int32], labels: NDArray[np.int64], moments: Moments, device: torch.device | str
    ) -> None:
        self._words = torch.from_numpy(words).flatten().to(device)
        self._within = torch.arange(SIDE, device=device)
        self.labels = torch.from_numpy(labels).to(device)
        mean, deviation = torch.tensor(moments, dtype=torch.float64)
        # for a row of pixels: three values at a time are slow on a CPU
        self._scale = (1 / (255 * deviation)).float().repeat(SIDE).to(device)
        self._shift = (mean / deviation).float().repeat(SIDE).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self) -> NDArray[np.uint8]:
        """(N, 32, 32, 3) the images as they were given."""
        bordered = self._words.cpu().view(torch.uint8).view(-1, WIDTH, WIDTH, 4).numpy()
        return bordered[:, PAD:-PAD, PAD:-PAD, :3]

    def crop(self, index: Tensor, top: Tensor, left: Tensor, flip: Tensor, replicas: int = 1) -> Tensor:
        """(B, 3, 32, 32) normalised float32 crops, channels-last.

        Image `index[i]` in its black border, cut `top[i]` pixels from above and `left[i]` from the left
        (0 to 8; 4 is the image itself) and, where `flip[i]`, mirrored. All four: (B,) integers.
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
        """A copy that holds the images `index` alone, in that order."""
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
    """(N, 40, 40) words of (N, 32, 32, 3) pixels in their black border."""
    words = np.zeros((len(pixels), WIDTH, WIDTH, 4), np.uint8)
    words[:, PAD:-PAD, PAD:-PAD, :3] = pixels
    return words.view(np.int32)[..., 0]


@dataclass(frozen=True)
class Dataset:
    """Images to train on and to test on, and the number of classes that their labels run over."""

    train: Images
    test: Images
    classes: int


def load_dataset(config: Config) -> Dataset:
    """The data set of `config` on its (resolved) device; kept, so that a process reads it once.

    With a validation split, `train` lacks the images held out and `test` is those: the test images are out of
    reach of whoever chooses by what such a run reports. Server and clients draw the same split from the seed.
    """
    if config.validation >= (available := _training_images(config)):
        raise UserError(f"validation = {config.validation} leaves none of the {available} training images: give less")
    read: Callable[..., Dataset]
    key: tuple[Any, ...]
    if config.dataset == "cifar100":
        read, key = _cifar100, (str(data_folder(config)), config.normalize, config.device)
    else:
        shape = (config.synthetic_classes, config.synthetic_images)
        read, key = _synthetic, (*shape, config.normalize, config.device)
    return _hold_out(read, key, config.validation, config.seed) if config.validation else read(*key)


def training_images(config: Config) -> int:
    """The images that `config` trains on, known without reading them."""
    return _training_images(config) - config.validation


def classes_of(config: Config) -> int:
    """The classes that its labels run over, known without reading them."""
    return 100 if config.dataset == "cifar100" else config.synthetic_classes


def moments_of(dataset: str, normalize: str) -> Moments:
    """What images of `dataset` are normalised by."""
    if normalize == "cifar10":
        return CIFAR10
    return CIFAR100 if dataset == "cifar100" else ((0.5,) * 3, (0.21,) * 3)


def _training_images(config: Config) -> int:
    return 50_000 if config.dataset == "cifar100" else config.synthetic_images


@functools.lru_cache(maxsize=1)  # a split is a copy of the images
def _hold_out(read: Callable[..., Dataset], key: tuple[Any, ...], count: int, seed: int) -> Dataset:
    whole = read(*key)
    order = numpy_stream(seed, 0, 0, "validation").permutation(len(whole.train))
    return Dataset(whole.train.subset(order[count:]), whole.train.subset(order[:count]), whole.classes)


def data_folder(config: Config) -> Path:
    """The folder that holds ``cifar-100-python``: the key, the environment's, or the user's cache."""
    return Path(config.data_dir or os.environ.get("FEDSIM_DATA") or user_cache()).expanduser().absolute()


@functools.lru_cache(maxsize=2)
def _cifar100(folder: str, normalize: str, device: str) -> Dataset:
    def decode() -> Arrays:
        arrays: Arrays = {}
        for split in SPLITS:
            pixels, arrays[f"{split}-labels"] = read_official(Path(folder), train=split == "train")
            arrays[f"{split}-words"] = bordered(pixels)
        return arrays

    names = [f"{split}-{kind}" for split in SPLITS for kind in ("words", "labels")]
    arrays = cached(official_files(Path(folder)), names, decode)
    moments = moments_of("cifar100", normalize)
    train, test = (
        Images.of_words(arrays[f"{split}-words"], arrays[f"{split}-labels"], moments, device) for split in SPLITS
    )
    return Dataset(train, test, classes=100)


@functools.lru_cache(maxsize=2)
def _synthetic(classes: int, images: int, normalize: str, device: str) -> Dataset:
    """A learnable set: each class is a coarse colour pattern, each image shifts it and drowns it in noise."""
    rng = np.random.default_rng(np.random.SeedSequence((classes, images)))
    patterns = rng.standard_normal((classes, 8, 8, 3), np.float32).repeat(4, axis=1).repeat(4, axis=2)

    def draw(count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        labels = rng.permutation(np.arange(count) % classes)
        rows, columns = (np.arange(SIDE) - rng.integers(-4, 5, size=(2, count, 1))) % SIDE
        pixels = np.empty((count, SIDE, SIDE, 3), np.uint8)
        for start in range(0, count, 1000):  # a part at a time, to spare memory
            part = slice(start, start + 1000)
            shifted = patterns[labels[part, None, None], rows[part, :, None], columns[part, None, :]]
            pixels[part] = (127.5 + 20 * shifted + 50 * rng.standard_normal(shifted.shape, np.float32)).clip(0, 255)
        return pixels, labels.astype(np.int64)

    moments = moments_of("synthetic", normalize)
    train, test = draw(images), draw(max(images // 4, 1))
    return Dataset(Images(*train, moments, device), Images(*test, moments, device), classes)


def shard(images: int, workers: int, worker: int, seed: int) -> NDArray[np.int64]:
    """The images of one worker: IID shards, disjoint, covering, their sizes at most one apart."""
    return np.array_split(_shuffled(images, seed), workers)[worker]


@functools.lru_cache(maxsize=2)  # every client asks in every round
def _shuffled(images: int, seed: int) -> NDArray[np.int64]:
    return numpy_stream(seed, 0, 0, "shard").permutation(images)


def check_shards(config: Config, images: int, workers: int) -> None:
    """Fail where `images` cannot give every one of `workers` a shard of a batch or more."""
    if workers > images:
        raise UserError(f"clients = {workers} is more than the {images} training images: give fewer clients")
    if config.batch_size > images // workers:
        raise UserError(
            f"batch-size = {config.batch_size} is more than a shard of {images // workers} images: "
            "give a smaller batch-size or fewer clients"
        )


def sample_order(
    size: int, first: int, count: int, seed: int, worker: int, round: int, reshuffle: str
) -> NDArray[np.int64]:
    """Which `count` of a shard's `size` images to take next.

    reshuffle = epoch: places `first` to `first + count` of an endless row of shuffled passes, so that every
    image is seen once before any is seen again, whatever the rounds. round: a shuffled pass begun at `round`.
    """
    if reshuffle == "round":
        rng = numpy_stream(seed, worker, round, "shuffle")
        return np.concatenate([rng.permutation(size) for _ in range(-(-count // size))])[:count]
    passes = range(first // size, (first + count - 1) // size + 1)
    order = np.concatenate([numpy_stream(seed, worker, p, "shuffle").permutation(size) for p in passes])
    return order[first - passes[0] * size :][:count]


def draws(index: NDArray[np.int64], augment: np.random.Generator) -> Tensor:
    """(4, N) what `Images.crop` takes of the N images `index`, on the CPU: which, from where, and mirrored or not."""
    corners = augment.integers(0, 2 * PAD + 1, (2, len(index)))
    return torch.from_numpy(np.stack([index, *corners, augment.integers(0, 2, len(index))]))


def batches(images: Images, drawn: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented batches of what `draws` drew: random crop in a border of 4, random mirror.

    Yields ((B, 3, 32, 32) float32, (B,) labels); the last batch is smaller where batch_size does not divide.
    """
    chosen, top, left, flip = drawn.to(images.labels.device)
    for start in range(0, len(chosen), batch_size):
        part = slice(start, start + batch_size)
        yield images.crop(chosen[part], top[part], left[part], flip[part]), images.labels[chosen[part]]
