"""Data sets in their official files, read by torchvision, which checks them."""

from __future__ import annotations

import contextlib
import pickle
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsim.data.images import Moments
from fedsim.errors import UserError

CIFAR10: Moments = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100: Moments = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
FASHION_MNIST: Moments = ((0.2860,), (0.3530,))

SILENCE_SECONDS = 60.0  # of a server that a data set is downloaded from


@dataclass(frozen=True)
class Facts:
    """The shape of a data set."""

    classes: int
    images: int  # for training
    shape: tuple[int, int, int]  # height, width and channels of an image
    moments: Moments


@dataclass(frozen=True)
class Official(Facts):
    """A data set with official files, and what is known of it without them."""

    reader: str  # the class in torchvision.datasets
    folder: str  # in the key data-dir
    files: tuple[str, ...]  # in this folder
    remedy: str  # what to do where it is missing
    download: bool = False


OFFICIAL = {
    "cifar100": Official(
        *(100, 50_000, (32, 32, 3), CIFAR100),
        reader="CIFAR100",
        folder="cifar-100-python",
        files=("train", "test", "meta"),
        remedy="put cifar-100-python.tar.gz there",
        download=True,
    ),
    "cifar10": Official(
        *(10, 50_000, (32, 32, 3), CIFAR10),
        reader="CIFAR10",
        folder="cifar-10-batches-py",
        files=(*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"),
        remedy="unpack cifar-10-python.tar.gz there, which holds cifar-10-batches-py/",
    ),
    "fashion-mnist": Official(
        *(10, 60_000, (28, 28, 1), FASHION_MNIST),
        reader="FashionMNIST",
        folder="FashionMNIST/raw",
        files=tuple(f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")),
        remedy="put its four unpacked files there, as FashionMNIST/raw/train-images-idx3-ubyte and so on",
    ),
}


def read_official(name: str, folder: Path, train: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(N, H, W, C) images and (N,) labels of one split of the data set `name` in `folder`."""
    import torchvision.datasets  # takes a second, and is needed only while nothing is cached

    official = OFFICIAL[name]
    reader = getattr(torchvision.datasets, official.reader)
    try:
        missing = not (folder / official.folder).exists()
        if missing and not official.download:
            raise FileNotFoundError(f"there is no {official.folder}")
        if missing:
            print(f"no {official.reader} in {folder}: downloading it there (169 MB)", file=sys.stderr)
        with _bounded_silence():
            read = reader(str(folder), train=train, download=missing)
    except OSError as error:
        why = "and it could not be downloaded or read" if official.download else "that can be read"
        raise UserError(
            f"data-dir = {folder} has no {official.reader} {why} ({_first_line(error)}): "
            f"{official.remedy}, or give --dataset synthetic"
        ) from error
    except Exception as error:  # torchvision does not document what damaged files raise
        again = "start again to download it again" if official.download else official.remedy
        raise UserError(
            f"data-dir = {folder} holds a damaged {official.folder} ({_first_line(error)}): remove it and {again}"
        ) from error
    return np.asarray(read.data).reshape(-1, *official.shape), np.asarray(read.targets).astype(np.int64)


@contextlib.contextmanager
def _bounded_silence() -> Iterator[None]:
    """Context manager: a server that sends nothing for `SILENCE_SECONDS` is an OSError; torchvision would wait."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def coarse_labels(folder: Path) -> NDArray[np.int64]:
    """(100,) superclasses, 0 to 19, of the classes of CIFAR-100, which torchvision does not read."""
    file = folder / OFFICIAL["cifar100"].folder / "train"
    with file.open("rb") as stream:
        entries = pickle.load(stream, encoding="latin1")
    coarse = np.empty(100, np.int64)
    coarse[entries["fine_labels"]] = entries["coarse_labels"]
    return coarse


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
