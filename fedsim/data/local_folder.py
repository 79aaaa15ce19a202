"""A node's own images, which never leave it, and the folders that `export-shards` writes for nodes.

The node config of a SuperNode may set `data-dir`. That folder holds either the data set of the run, of which the node
uses its shard, or the node's own images in ``images.npy`` and ``labels.npy``. The node trains on all of its own images:
the key `validation` of a run only holds out images of the run's data set, on the server. The `data-dir` of the run must
not hold these two files, as every client would train on them.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedsim.config import Config
from fedsim.data.cache import Arrays, cached, discard_damaged
from fedsim.data.datasets import digests_of, load_dataset, task_of, verify_data
from fedsim.data.folder import data_folder
from fedsim.data.image_sets import augmentation_of, digest, facts_of, is_synthetic, moments_of
from fedsim.data.images import Images, bordered
from fedsim.data.official import OFFICIAL
from fedsim.data.own_arrays import problem_of
from fedsim.data.partition import check_partition, shard_of
from fedsim.data.uneven import partition_of
from fedsim.errors import UserError
from fedsim.system.locks import READING

IMAGES, LABELS = "images.npy", "labels.npy"


class _Own(NamedTuple):
    """A node's own images, and the SHA-256 of each of its two files' arrays."""

    images: Images
    sha256: dict[str, str]


def own_images(config: Config) -> Images | None:
    """The images in images.npy and labels.npy of `data-dir`; None if it has no such files."""
    own = _own(config)
    return own and own.images


def digests_of_node(config: Config) -> dict[str, str]:
    """The SHA-256 of each array that a node has: of its own two files, or of the run's data set."""
    own = _own(config)
    return own.sha256 if own else digests_of(config)


def _own(config: Config) -> _Own | None:
    if not _holds_images(config):
        return None
    folder = data_folder(config)
    _check_images(config, folder, "holds")
    with READING:
        return _read_own(config, folder, *(_changed(folder / name) for name in (IMAGES, LABELS)))


@functools.lru_cache(maxsize=8)
def _read_own(config: Config, folder: Path, *changed: int) -> _Own:
    pixels, labels = (_mapped(folder, name) for name in (IMAGES, LABELS))
    problem = _problem(pixels, labels, config)
    for official in OFFICIAL.values():
        if (folder / official.folder).exists():
            problem = f"it holds {official.folder}/ too: keep one of the two"
    if problem:
        raise UserError(f"data-dir = {folder}: {problem}")
    how = augmentation_of(config)

    def make() -> Arrays:
        return {"words": bordered(pixels, how.border), "sha256": np.frombuffer(digest(pixels), np.uint8)}

    arrays = cached([folder / IMAGES], ["words", "sha256"], make, how.border.form)
    labels = labels.astype(np.int64)
    images = Images(arrays["words"], labels, moments_of(config), config.device, how)
    return _Own(images, {IMAGES: arrays["sha256"].tobytes().hex(), LABELS: digest(labels).hex()})


def _check_images(config: Config, folder: Path, holds: str) -> None:
    if not task_of(config).of_images:
        raise UserError(
            f"{folder} {holds} {IMAGES} and {LABELS}, and dataset = {config.dataset} is not of images: only these can "
            "be a node's own"
        )


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
            f"config of that node, and give the run a folder that holds its data set"
        )


def verify_images(config: Config) -> None:
    """Verify the data of a node, as `verify_data` does that of the run; its own images may be cached too."""
    if not _holds_images(config):
        verify_data(config)
    elif discard_damaged([data_folder(config) / IMAGES], augmentation_of(config).border.form):
        _read_own.cache_clear()


def check_named(config: Config) -> None:
    """Raise UserError if the `data-dir` of a node config holds no images: a node downloads none."""
    folder = data_folder(config)
    official = OFFICIAL.get(config.dataset)
    present = os.path.exists(folder / (official.folder if official else config.dataset))
    if own_images(config) is None and not (present and not is_synthetic(config.dataset)):
        also = f", or {official.folder}/" if official else ""
        wanted = f"{IMAGES} and {LABELS}{also}"
        raise UserError(f"data-dir = {folder} of the node config holds no images: it must hold {wanted}")


def _mapped(folder: Path, name: str) -> NDArray[Any]:
    try:
        return np.lib.format.open_memmap(folder / name, mode="c")
    except Exception as error:  # NumPy does not document what a damaged header raises
        reason = " ".join(str(error).split())
        raise UserError(f"data-dir = {folder}: {name} cannot be read as an array ({reason})") from error


def _problem(pixels: NDArray[Any], labels: NDArray[Any], config: Config) -> str:
    """What is wrong with a node's own images, or ""."""
    if problem := problem_of(pixels, labels, IMAGES, LABELS, facts_of(config).shape):
        return problem
    if len(labels) < (1 if partition_of(config).small_shards else config.batch_size):
        return f"batch-size = {config.batch_size} is more than its {len(labels)} images: give a smaller batch-size"
    if labels.min() < 0 or labels.max() >= facts_of(config).classes:
        last = facts_of(config).classes - 1
        return f"{LABELS} runs from {labels.min()} to {labels.max()}: the classes of {config.dataset} are 0 to {last}"
    return ""


def write_shards(config: Config, out: Path) -> None:
    """Write the shards of a run of `config` to the new folders `out`/0 to `out`/K-1, one for each client.

    `out` appears only when it is complete, and is never overwritten.
    """
    _check_images(config, out, "would hold")
    images = load_dataset(config).train
    assert isinstance(images, Images)
    check_partition(config)
    pixels, labels = images.pixels(), images.labels.numpy()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            for worker in range(config.clients):
                held = shard_of(config, worker)
                (part / str(worker)).mkdir()
                np.save(part / str(worker) / IMAGES, pixels[held])
                np.save(part / str(worker) / LABELS, labels[held])
            part.chmod(0o755)  # mkdtemp makes it readable by this user only
            part.rename(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise UserError(f"out = {out} cannot be made ({error.strerror}): give another folder") from error
