"""The official CIFAR-100, read by torchvision, which checks its MD5 sums and downloads it if it is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import UserError

OFFICIAL = "cifar-100-python"


def official_files(folder: Path) -> list[Path]:
    """The files in `folder` that the images are decoded from."""
    return [folder / OFFICIAL / name for name in ("train", "test", "meta")]


def read_official(folder: Path, train: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(N, 32, 32, 3) images and (N,) labels of one split, downloaded to `folder` if it has none."""
    from torchvision.datasets import CIFAR100  # takes a second, and is needed only while nothing is cached

    try:
        missing = not (folder / OFFICIAL).exists()
        if missing:
            print(f"no CIFAR-100 in {folder}: downloading it there (169 MB)", file=sys.stderr)
        official = CIFAR100(str(folder), train=train, download=missing)
    except (RuntimeError, EOFError) as error:
        raise UserError(
            f"data-dir = {folder} holds a damaged {OFFICIAL} ({_first_line(error)}): "
            "remove it and start again to download it again"
        ) from error
    except OSError as error:
        raise UserError(
            f"data-dir = {folder} has no CIFAR-100 and it could not be downloaded or read ({_first_line(error)}): "
            f"put {CIFAR100.filename} there, or give --dataset synthetic"
        ) from error
    return official.data, np.array(official.targets, np.int64)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
