"""A user's own data sets: four arrays in a file NAME.npz, or returned by a function."""

from __future__ import annotations

import functools
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.data.cache import Arrays
from fedsim.data.images import Border, Moments, bordered_bytes
from fedsim.errors import UserError
from fedsim.registry import DATASETS, describe
from fedsim.system.locks import GLOBAL_GENERATORS

MAX_CLASSES = 100_000  # more are a mistake, and the last layer would not fit in memory
MAX_CHANNELS = 16  # of images 1 or 3 pixels high: with more, their channels come first
NAMES = ("train_images", "train_labels", "test_images", "test_labels")


def read_npz(file: Path, border: Border) -> Arrays:
    """The four arrays of a file, checked.

    They are not read where they, and the images with their `border`, need more memory than is free: a small file may
    expand to any size.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            _check_memory(file, _sizes(archive), border)
        with file.open("rb") as opened, np.lib.npyio.NpzFile(opened) as held:
            arrays = {name: held[name] for name in held.files if name in NAMES}
    except UserError:
        raise
    except zipfile.BadZipFile as error:
        raise UserError(f"dataset = {file} is not a file of numpy.savez ({describe(error)}): write it again") from error
    except Exception as error:  # NumPy does not document what a damaged file raises
        raise UserError(f"dataset = {file} cannot be read ({describe(error)}): give a file of numpy.savez") from error
    return checked(str(file), arrays)


def _sizes(archive: zipfile.ZipFile) -> dict[str, tuple[tuple[int, ...], int]]:
    """The shape of each of the arrays and the bytes of a value in it, by the headers alone."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    sizes = {}
    for name in NAMES:
        if f"{name}.npy" in archive.namelist():
            with archive.open(f"{name}.npy") as member:
                read = readers.get(np.lib.format.read_magic(member))
                if read is None:
                    raise ValueError(f"{name} is in another version of the format")
                shape, _, dtype = read(member)
            sizes[name] = shape, dtype.itemsize
    return sizes


def _check_memory(file: Path, sizes: Mapping[str, tuple[tuple[int, ...], int]], border: Border) -> None:
    import psutil  # here: the processes of clients find the arrays in the cache

    needed = sum(math.prod(shape) * size for shape, size in sizes.values())
    needed += sum(bordered_bytes(shape, border) for shape, _ in sizes.values() if len(shape) == 4)
    if needed > (free := psutil.virtual_memory().available):
        raise UserError(
            f"dataset = {file} needs {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free: "
            "give fewer or smaller images"
        )


def returned(spec: str) -> Mapping[str, Any]:
    """What the function `spec` returns; raises UserError where it fails, or returns no dict."""
    try:
        [choice] = DATASETS.read(spec)
    except ValueError as error:
        raise UserError(f"dataset = {spec}: {error}") from error
    try:
        with GLOBAL_GENERATORS:  # it may draw from them
            arrays = choice.make()
    except UserError:
        raise
    except Exception as error:  # the function may raise anything
        raise UserError(f"dataset = {spec} fails with {describe(error)}") from error
    if not isinstance(arrays, Mapping):
        raise UserError(
            f"dataset = {spec} returns {type(arrays).__name__}: it must return a dict of {', '.join(NAMES)}"
        )
    return arrays


first_returned = functools.lru_cache(maxsize=1)(returned)  # to be cleared by who makes examples of it


@functools.lru_cache(maxsize=8)
def names_of(spec: str) -> frozenset[str]:
    """The names in what the function `spec` returns."""
    return frozenset(first_returned(spec))


def checked(dataset: str, arrays: Mapping[str, Any]) -> Arrays:
    """The arrays with int64 labels; raises UserError with what is wrong with the arrays of `dataset`."""
    if missing := [name for name in NAMES if name not in arrays]:
        raise UserError(f"dataset = {dataset} has no {', '.join(missing)}: it must have {', '.join(NAMES)}")
    of = {name: _array(dataset, name, arrays[name]) for name in NAMES}
    shape = of["train_images"].shape[1:]
    for split in ("train", "test"):
        names = f"{split}_images", f"{split}_labels"
        images, labels = (of[name] for name in names)
        if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] > MAX_CHANNELS:
            problem = f"{names[0]} holds {list(images.shape)}: images must be (N, H, W, C), channels last"
        else:
            problem = problem_of(images, labels, *names, shape)
        if not problem and not images.size:
            problem = f"{names[0]} holds no pixels: {list(images.shape)}"
        elif not problem and not 0 <= labels.min() <= labels.max() < MAX_CLASSES:
            problem = (
                f"{names[1]} runs from {labels.min()} to {labels.max()}: classes are 0 to {MAX_CLASSES - 1} at most"
            )
        if problem:
            raise UserError(f"dataset = {dataset}: {problem}")
    return {name: array if name.endswith("images") else array.astype(np.int64) for name, array in of.items()}


def _array(dataset: str, name: str, value: Any) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except Exception as error:  # of a list of unequal images, or of what NumPy does not know
        raise UserError(
            f"dataset = {dataset}: {name} is not an array ({describe(error)}): let all images have one size"
        ) from error


def problem_of(
    images: NDArray[Any], labels: NDArray[Any], images_name: str, labels_name: str, shape: tuple[int, ...]
) -> str:
    """What is wrong with images that should have the `shape` (H, W, C) and their labels, or ""."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape:
        wanted = ", ".join(map(str, shape)) if len(shape) == 3 else "H, W, C"
        return f"{images_name} holds {images.dtype} {list(images.shape)}, not uint8 [N, {wanted}]"
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        return f"{labels_name} holds {labels.dtype} {list(labels.shape)}, not integers [N]"
    if len(images) != len(labels):
        return f"{images_name} holds {len(images)} images and {labels_name} {len(labels)} labels: make them equal"
    return ""


def moments_of_images(images: NDArray[np.uint8]) -> Moments:
    """Mean and standard deviation of each channel, of pixel / 255, from exact counts of the 256 values."""
    values = np.arange(256) / 255
    mean, deviation = [], []
    for channel in np.moveaxis(images, -1, 0):
        counts = np.zeros(256, np.int64)
        for start in range(0, len(channel), 1000):  # in parts, as `bincount` makes an int64 of each pixel
            counts += np.bincount(channel[start : start + 1000].ravel(), minlength=256)
        share = counts / channel.size
        mean.append(float(share @ values))
        deviation.append(float(share @ (values - mean[-1]) ** 2) ** 0.5 or 1.0)  # of a constant channel
    return tuple(mean), tuple(deviation)
