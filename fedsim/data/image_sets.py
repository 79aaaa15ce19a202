"""Labelled images as a data set: official files, a synthetic set or a user's own arrays."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from fedsim.config import Config
from fedsim.data.augment import CUTS, ORDERS
from fedsim.data.cache import Arrays, cached, discard_damaged
from fedsim.data.folder import data_folder, located
from fedsim.data.images import BLACK, Augmentation, Border, Images, ImageShape, Moments, bordered
from fedsim.data.official import CIFAR10, OFFICIAL, Facts, read_official
from fedsim.data.own_arrays import NAMES, checked, first_returned, moments_of_images, read_npz, returned
from fedsim.data.task import Dataset
from fedsim.errors import UserError
from fedsim.registry import is_own
from fedsim.system.locks import READING
from strategies.arguments import at_least, at_most, split_name

SPLITS = ("train", "test")
Split = tuple[NDArray[np.uint8], NDArray[np.int64]]  # (N, H, W, C) images and (N,) labels
STORED = ("train-words", "train-labels", "test-words", "test-labels", "sha256")  # of a data set in the cache
SYNTHETIC = (32, 32, 3), ((0.5,) * 3, (0.21,) * 3)  # shape of its images, and their moments


@dataclass(frozen=True)
class Synthetic:
    """Images of coarse patterns, one for each of the `classes`, with noise; the test set is a quarter of `images`."""

    classes: Annotated[int, at_least(2), at_most(1000)] = 10
    images: Annotated[int, at_least(1), at_most(10**8)] = 8000


def load_images(config: Config) -> Dataset[Images]:
    """The images of `config` on its device, without a validation split; a process reads them only once."""
    image_shape(config)
    return _whole(*_key(config, config.device))


def digests_of_images(config: Config) -> dict[str, str]:
    """The SHA-256 of each of the arrays `NAMES` of the data set of `config`, whatever its device."""
    return _whole(*_key(config, "cpu")).sha256


def _key(config: Config, device: str) -> tuple[Any, ...]:
    """The arguments of `_whole` for the data set of `config`."""
    facts = replace(facts_of(config), moments=moments_of(config))
    return config.dataset, _folder(config), facts, device, augmentation_of(config)


def image_shape(config: Config) -> ImageShape:
    """The shape of a model's input; raises UserError where crops of this kind cannot be cut."""
    height, width, channels = facts_of(config).shape
    _check_crops(config, min(height, width))
    size = augmentation_of(config).crop_size
    return channels, size or height, size or width


def _check_crops(config: Config, side: int) -> None:
    """Raise UserError where crops do not fit images of this smaller side, or an argument has no effect on them."""
    for choice in config.choices("augment"):
        if choice.name not in CUTS:
            continue
        what, size = f"augment = {config.augment}", choice.arguments["size"]
        padding, mode = choice.arguments["padding"], choice.arguments["mode"]
        if size > (most := side + 2 * padding):
            raise UserError(
                f"{what}: size = {size} is more than the {most} pixels of an image of {config.dataset} with its "
                "border: give less, or a larger padding"
            )
        if choice.name == "center" and size <= side and choice.given.keys() - {"size"}:
            raise UserError(f"{what}: a crop in the middle does not reach into the border: leave out padding and mode")
        if mode == "reflect" and not 0 < padding < side:
            raise UserError(
                f"{what}: mode = reflect needs a border narrower than the {side} pixels of an image, and not padding = "
                f"{padding}: give 1 to {side - 1}"
            )
        if config.augment == str(choice) and choice.name == "crop" and padding == 0 and size == 0:
            raise UserError(f"{what}: a crop without a border is the whole image: give more padding, or none")


def augmentation_of(config: Config) -> Augmentation:
    """How batches are made of the images of `config`; raises UserError where the parts do not go together."""
    choices = config.choices("augment")
    names = [choice.name for choice in choices]
    built_in = [name for name in names if not is_own(name)]
    own = "+".join(str(choice) for choice in choices if is_own(choice.name))
    if built_in not in ORDERS or names[: len(built_in)] != built_in:
        raise UserError(f"augment = {config.augment}: give crop or center, then mirror, then functions of your own")
    cut = next((choice.make() for choice in choices if choice.name in CUTS), None)
    border = Border(cut.padding, cut.mode) if cut else BLACK
    return Augmentation("crop" in names, "mirror" in names, own, cut.size if cut else 0, border)


def moments_of(config: Config) -> Moments:
    """The constants that normalise images: the data set's, those of CIFAR-10, or 0 and 1, as `normalize` says."""
    facts = facts_of(config)
    if config.normalize == "dataset":
        return facts.moments
    if config.normalize == "none":
        return (0.0,) * facts.shape[2], (1.0,) * facts.shape[2]
    if facts.shape[2] != 3:
        raise UserError(
            f"normalize = {config.normalize} has 3 channels, and the images of {config.dataset} {facts.shape[2]}: "
            "leave it out"
        )
    return CIFAR10


def facts_of(config: Config) -> Facts:
    """Classes, images, shape and moments of the data set of `config`; data is read only for a user's own set."""
    if is_synthetic(config.dataset):
        made: Synthetic = config.choice("dataset").make()
        return Facts(made.classes, made.images, *SYNTHETIC)
    if official := OFFICIAL.get(config.dataset):
        return official
    with READING:
        return _own_facts(config.dataset, _folder(config), augmentation_of(config).border)


@functools.lru_cache(maxsize=8)
def _own_facts(dataset: str, folder: str, border: Border) -> Facts:
    arrays = _arrays(dataset, folder, border)
    classes = 1 + max(int(arrays[f"{split}-labels"].max()) for split in SPLITS)
    count, height, width, _ = arrays["train-words"].shape
    mean, deviation = (tuple(map(float, row)) for row in arrays["moments"])
    height, width = height - 2 * border.padding, width - 2 * border.padding
    return Facts(classes, count, (height, width, len(mean)), (mean, deviation))


def is_synthetic(dataset: str) -> bool:
    """Whether a text of the key dataset is that of the synthetic set."""
    return split_name(dataset)[0] == "synthetic"


def _folder(config: Config) -> str:
    """The data folder; "" for a data set without files."""
    return "" if is_synthetic(config.dataset) or is_own(config.dataset) else str(data_folder(config))


def files_of(dataset: str, folder: str) -> list[Path]:
    """The files of a data set; a relative NAME.npz is looked for in `folder`, then in the working directory."""
    if official := OFFICIAL.get(dataset):
        return [Path(folder) / official.folder / name for name in official.files]
    if not dataset.endswith(".npz"):
        return []
    return [located(dataset, dataset, folder)]


def verify_image_files(config: Config) -> None:
    """Verify the data set of `config`, once per process.

    Decoded images in the cache are checked (0.4 s); damaged ones are removed and decoded again. A function of the
    user's is called again. Raises UserError if it gives other data, or if a file has changed since it was read.
    """
    if is_own(config.dataset):
        _check_repeatable(config.dataset, augmentation_of(config).border)
    elif folder := _folder(config):
        for file in files_of(config.dataset, folder) if config.dataset.endswith(".npz") else ():
            if _version(file) != _version_read(file):
                raise UserError(
                    f"dataset = {config.dataset}: {file} has changed since this process read it: start another process"
                )
        _verify_cache(config.dataset, folder, augmentation_of(config).border)


@functools.lru_cache(maxsize=8)
def _check_repeatable(dataset: str, border: Border) -> None:
    first, again = (
        _of_function(dataset, border)["sha256"],
        _digests(checked(dataset, returned(dataset))[name] for name in NAMES),
    )
    if changed := [name for name, *rows in zip(NAMES, first, again, strict=True) if not np.array_equal(*rows)]:
        raise UserError(
            f"dataset = {dataset} gives other {', '.join(changed)} when it is called again: draw with a seed, in the "
            "function itself"
        )


def _version(file: Path) -> tuple[int, int]:
    """The time and size by which a file is known to have changed."""
    status = file.stat()
    return status.st_mtime_ns, status.st_size


@functools.cache  # as long as the process, which keeps what it has found out about the data
def _version_read(file: Path) -> tuple[int, int]:
    return _version(file)


@functools.lru_cache(maxsize=8)
def _verify_cache(dataset: str, folder: str, border: Border) -> None:
    if discard_damaged(files_of(dataset, folder), border.form):
        for read in (_whole, _own_facts):
            read.cache_clear()


@functools.lru_cache(maxsize=2)
def _whole(dataset: str, folder: str, facts: Facts, device: str, how: Augmentation) -> Dataset[Images]:
    if is_synthetic(dataset):
        arrays = _synthetic_arrays(facts.classes, facts.images, how.border)
    else:
        arrays = _arrays(dataset, folder, how.border)
    train, test = (
        Images(arrays[f"{split}-words"], arrays[f"{split}-labels"], facts.moments, device, how) for split in SPLITS
    )
    sha256 = {name: row.tobytes().hex() for name, row in zip(NAMES, arrays["sha256"], strict=True)}
    return Dataset(train, test, facts.classes, sha256)


def _arrays(dataset: str, folder: str, border: Border) -> Arrays:
    """The arrays `STORED` of a data set, and the moments of a user's own; those of files are cached."""
    if is_own(dataset):
        return _of_function(dataset, border)
    files = files_of(dataset, folder)
    if dataset in OFFICIAL:
        splits = (read_official(dataset, Path(folder), train) for train in (True, False))
        return cached(files, STORED, lambda: _with_border(splits, border), border.form)
    _version_read(files[0])
    return cached(files, (*STORED, "moments"), lambda: _with_moments(read_npz(files[0], border), border), border.form)


@functools.lru_cache(maxsize=2)
def _of_function(dataset: str, border: Border) -> Arrays:
    arrays = _with_moments(checked(dataset, first_returned(dataset)), border)
    first_returned.cache_clear()
    return arrays


def _with_moments(own: Arrays, border: Border) -> Arrays:
    moments = np.array(moments_of_images(own["train_images"]))
    splits = ((own[f"{split}_images"], own[f"{split}_labels"]) for split in SPLITS)
    return {"moments": moments, **_with_border(splits, border)}


def _with_border(splits: Iterable[Split], border: Border) -> Arrays:
    """The arrays `STORED` of both splits."""
    arrays: Arrays = {}
    digests = []
    for name, (pixels, labels) in zip(SPLITS, splits, strict=True):
        arrays[f"{name}-words"], arrays[f"{name}-labels"] = bordered(pixels, border), labels
        digests.append(_digests((pixels, labels)))
    return {**arrays, "sha256": np.concatenate(digests)}


def _digests(arrays: Iterable[NDArray[Any]]) -> NDArray[np.uint8]:
    """(arrays, 32) The SHA-256 of the shape and the values of each array."""
    return np.stack([np.frombuffer(digest(array), np.uint8) for array in arrays])


def digest(array: NDArray[Any]) -> bytes:
    """The SHA-256 of the shape and the values of an array, read in parts, to save memory where it is not contiguous."""
    sha256 = hashlib.sha256(repr(array.shape).encode())
    for start in range(0, len(array), 1000):
        sha256.update(np.ascontiguousarray(array[start : start + 1000]).data)
    return sha256.digest()


@functools.lru_cache(maxsize=1)
def _synthetic_arrays(classes: int, images: int, border: Border) -> Arrays:
    return _with_border(_synthetic(classes, images), border)


def _synthetic(classes: int, images: int) -> Iterator[Split]:
    """A learnable set: each class is a coarse colour pattern, each image a shifted copy of it with strong noise."""
    rng = np.random.default_rng(np.random.SeedSequence((classes, images)))
    patterns = rng.standard_normal((classes, 8, 8, 3), np.float32).repeat(4, axis=1).repeat(4, axis=2)
    side = patterns.shape[1]
    for count in (images, max(images // 4, 1)):
        labels = rng.permutation(np.arange(count) % classes)
        rows, columns = (np.arange(side) - rng.integers(-4, 5, size=(2, count, 1))) % side
        pixels = np.empty((count, side, side, 3), np.uint8)
        for start in range(0, count, 1000):  # in parts, to save memory
            part = slice(start, start + 1000)
            shifted = patterns[labels[part, None, None], rows[part, :, None], columns[part, None, :]]
            pixels[part] = (127.5 + 20 * shifted + 50 * rng.standard_normal(shifted.shape, np.float32)).clip(0, 255)
        yield pixels, labels.astype(np.int64)
