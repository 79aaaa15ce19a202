"""The data sets, by name: CIFAR-100 and a synthetic set, with an optional validation split."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.config import Config
from fedsim.data.cache import Arrays, cached, discard_damaged, user_cache
from fedsim.data.cifar100 import official_files, read_official
from fedsim.data.images import SIDE, Images, Moments, bordered
from fedsim.errors import UserError
from fedsim.rng import generator

CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Dataset:
    """Training images, test images, and the number of classes."""

    train: Images
    test: Images
    classes: int


def load_dataset(config: Config, verify: bool = True) -> Dataset:
    """The data set of `config` (resolved) on its device; a process reads it only once.

    With `verify`, the decoded images in the cache are verified first (see `verify_cache`).

    With a validation split, `test` is the images held out of `train`, so that no choice can depend on the test images.
    Server and clients draw the same split from the seed.
    """
    if config.validation >= (available := _training_images(config)):
        raise UserError(f"validation = {config.validation} leaves none of the {available} training images: give less")
    if verify:
        verify_cache(config)
    read: Callable[..., Dataset]
    key: tuple[Any, ...]
    if config.dataset == "cifar100":
        read, key = _cifar100, (str(data_folder(config)), config.normalize, config.device)
    else:
        shape = (config.synthetic_classes, config.synthetic_images)
        read, key = _synthetic, (*shape, config.normalize, config.device)
    return _hold_out(read, key, config.validation, config.seed) if config.validation else read(*key)


def verify_cache(config: Config) -> None:
    """Check the decoded images in the cache, once per process (0.4 s); damaged ones are removed and decoded again."""
    if config.dataset == "cifar100":
        _verify(str(data_folder(config)))


@functools.lru_cache(maxsize=8)
def _verify(folder: str) -> None:
    if discard_damaged(official_files(Path(folder))):
        _cifar100.cache_clear()
        _hold_out.cache_clear()


def training_images(config: Config) -> int:
    """The number of images that `config` trains on; reads no data."""
    return _training_images(config) - config.validation


def classes_of(config: Config) -> int:
    """The number of classes of the data set of `config`; reads no data."""
    return 100 if config.dataset == "cifar100" else config.synthetic_classes


def moments_of(dataset: str, normalize: str) -> Moments:
    """The constants that normalise images of `dataset`; `normalize` = cifar10: CIFAR-10's."""
    if normalize == "cifar10":
        return CIFAR10
    return CIFAR100 if dataset == "cifar100" else ((0.5,) * 3, (0.21,) * 3)


def _training_images(config: Config) -> int:
    return 50_000 if config.dataset == "cifar100" else config.synthetic_images


@functools.lru_cache(maxsize=1)  # a split is a copy of the images
def _hold_out(read: Callable[..., Dataset], key: tuple[Any, ...], count: int, seed: int) -> Dataset:
    whole = read(*key)
    order = generator(seed, 0, 0, "validation").permutation(len(whole.train))
    return Dataset(whole.train.subset(order[count:]), whole.train.subset(order[:count]), whole.classes)


def data_folder(config: Config) -> Path:
    """The folder that holds ``cifar-100-python``: the key data-dir, FEDSIM_DATA, or the user's cache."""
    named = config.data_dir or os.environ.get("FEDSIM_DATA") or user_cache()
    try:
        return Path(named).expanduser().absolute()
    except RuntimeError as error:  # ~user
        raise UserError(f"data-dir = {named}: there is no such user: give another folder") from error


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
    """A learnable set: each class is a coarse colour pattern, each image a shifted copy of it with strong noise."""
    rng = np.random.default_rng(np.random.SeedSequence((classes, images)))
    patterns = rng.standard_normal((classes, 8, 8, 3), np.float32).repeat(4, axis=1).repeat(4, axis=2)

    def draw(count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        labels = rng.permutation(np.arange(count) % classes)
        rows, columns = (np.arange(SIDE) - rng.integers(-4, 5, size=(2, count, 1))) % SIDE
        pixels = np.empty((count, SIDE, SIDE, 3), np.uint8)
        for start in range(0, count, 1000):  # in parts, to save memory
            part = slice(start, start + 1000)
            shifted = patterns[labels[part, None, None], rows[part, :, None], columns[part, None, :]]
            pixels[part] = (127.5 + 20 * shifted + 50 * rng.standard_normal(shifted.shape, np.float32)).clip(0, 255)
        return pixels, labels.astype(np.int64)

    moments = moments_of("synthetic", normalize)
    train, test = draw(images), draw(max(images // 4, 1))
    return Dataset(Images(*train, moments, device), Images(*test, moments, device), classes)
