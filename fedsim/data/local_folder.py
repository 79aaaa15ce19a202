"""A node's own images, which never leave it, and the folders that `export-shards` writes for nodes.

The node config of a SuperNode may set `data-dir`. That folder holds either the official CIFAR-100, of which the node
uses its shard, or ``images.npy`` and ``labels.npy``, this node's own images. The node trains on all of its own images:
the run's `validation` holds out images of the run's dataset, on the server. The `data-dir` of the run must not hold
such files, as every client would train on them.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.config import Config
from fedsim.data.cache import cached, discard_damaged
from fedsim.data.cifar100 import OFFICIAL
from fedsim.data.datasets import classes_of, data_folder, load_dataset, moments_of, verify_cache
from fedsim.data.images import SIDE, Images, bordered
from fedsim.data.partition import check_shards, shard
from fedsim.errors import UserError

IMAGES, LABELS = "images.npy", "labels.npy"


def own_images(config: Config) -> Images | None:
    """The images in images.npy and labels.npy of `data-dir`; None if it has no such files."""
    if not _holds_images(config):
        return None
    folder = data_folder(config)
    return _own_images(config, str(folder), *(_changed(folder / name) for name in (IMAGES, LABELS)))


@functools.lru_cache(maxsize=8)
def _own_images(config: Config, place: str, *changed: int) -> Images:
    folder = Path(place)
    pixels, labels = (_mapped(folder, name) for name in (IMAGES, LABELS))
    problem = _problem(pixels, labels, config)
    if (folder / OFFICIAL).exists():
        problem = f"it holds {OFFICIAL}/ too: keep one of the two"
    if problem:
        raise UserError(f"data-dir = {folder}: {problem}")
    arrays = cached([folder / IMAGES], ["words"], lambda: {"words": bordered(pixels)})
    moments = moments_of(config.dataset, config.normalize)
    return Images.of_words(arrays["words"], labels.astype(np.int64), moments, config.device)


def _changed(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0


def _holds_images(config: Config) -> bool:
    folder = data_folder(config)
    return bool(config.data_dir) and any(os.path.exists(folder / name) for name in (IMAGES, LABELS))


def check_of_run(config: Config) -> None:
    """Raise UserError if the `data-dir` of the run, which all clients share, holds the images of a single node."""
    if _holds_images(config):
        raise UserError(
            f"data-dir = {config.data_dir} holds {IMAGES} or {LABELS}, the images of one node: name it in the node "
            f"config of that node, and give the run a folder that holds {OFFICIAL}/"
        )


def verify_images(config: Config) -> None:
    """Check the cached images of a node, its own or the run's; damaged ones are removed and decoded again."""
    if not _holds_images(config):
        verify_cache(config)
    elif discard_damaged([data_folder(config) / IMAGES]):
        _own_images.cache_clear()


def check_named(config: Config) -> None:
    """Raise UserError if the `data-dir` of a node config holds no images: a node downloads none."""
    folder = data_folder(config)
    official = config.dataset == "cifar100" and os.path.exists(folder / OFFICIAL)
    if own_images(config) is None and not official:
        wanted = f"{IMAGES} and {LABELS}" + (f", or {OFFICIAL}/" if config.dataset == "cifar100" else "")
        raise UserError(f"data-dir = {folder} of the node config holds no images: it must hold {wanted}")


def _mapped(folder: Path, name: str) -> NDArray[Any]:
    try:
        return np.lib.format.open_memmap(folder / name, mode="c")
    except Exception as error:  # NumPy does not document what a damaged header raises
        reason = " ".join(str(error).split())
        raise UserError(f"data-dir = {folder}: {name} cannot be read as an array ({reason})") from error


def _problem(pixels: NDArray[Any], labels: NDArray[Any], config: Config) -> str:
    """What is wrong with a node's own images, or ""."""
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (SIDE, SIDE, 3):
        return f"{IMAGES} holds {pixels.dtype} {list(pixels.shape)}, not uint8 [N, {SIDE}, {SIDE}, 3]"
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        return f"{LABELS} holds {labels.dtype} {list(labels.shape)}, not integers [N]"
    if len(pixels) != len(labels):
        return f"{IMAGES} holds {len(pixels)} images and {LABELS} {len(labels)} labels: make them equal"
    if len(labels) < config.batch_size:
        return f"batch-size = {config.batch_size} is more than its {len(labels)} images: give a smaller batch-size"
    if labels.min() < 0 or labels.max() >= classes_of(config):
        last = classes_of(config) - 1
        return f"{LABELS} runs from {labels.min()} to {labels.max()}: the classes of {config.dataset} are 0 to {last}"
    return ""


def write_shards(config: Config, out: Path) -> None:
    """Write the shards of a run of `config` to the new folders `out`/0 to `out`/K-1, one for each client.

    `out` appears only when it is complete, and is never overwritten.
    """
    images = load_dataset(config).train
    check_shards(config, len(images), config.clients)
    pixels, labels = images.pixels(), images.labels.numpy()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            for worker in range(config.clients):
                held = shard(len(images), config.clients, worker, config.seed)
                (part / str(worker)).mkdir()
                np.save(part / str(worker) / IMAGES, pixels[held])
                np.save(part / str(worker) / LABELS, labels[held])
            part.chmod(0o755)  # mkdtemp makes it readable by this user only
            part.rename(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise UserError(f"out = {out} cannot be made ({error.strerror}): give another folder") from error
