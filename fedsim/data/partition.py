"""Which images each worker trains on, and in which order."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.rng import generator


def shard(images: int, workers: int, worker: int, seed: int) -> NDArray[np.int64]:
    """The images of one worker: IID shards, disjoint and covering all images, with sizes that differ by at most one."""
    return np.array_split(_shuffled(images, seed), workers)[worker]


@functools.lru_cache(maxsize=2)  # called by every client in every round
def _shuffled(images: int, seed: int) -> NDArray[np.int64]:
    return generator(seed, 0, 0, "shard").permutation(images)


def check_shards(config: Config, images: int, workers: int) -> None:
    """Raise UserError if the shards of `images` among `workers` would be smaller than a batch."""
    if workers > images:
        raise UserError(f"clients = {workers} is more than the {images} training images: give fewer clients")
    if config.batch_size > images // workers:
        raise UserError(
            f"batch-size = {config.batch_size} is more than a shard of {images // workers} images: "
            "give a smaller batch-size or fewer clients"
        )


def sample_order(size: int, first: int, count: int, seed: int, worker: int, shuffle_every: str) -> NDArray[np.int64]:
    """(count,) indices into a shard of `size` images: a worker's samples `first` to `first` + `count` of the run.

    `shuffle_every` = epoch: the run is a sequence of shuffled passes over the shard, so that a worker that takes part
    in every round sees each image once per pass. A worker that a round leaves out skips the samples of that round.
    `shuffle_every` = round: a new shuffled pass begins at `first`.
    """
    if shuffle_every == "round":
        rng = generator(seed, worker, first, "shuffle")
        return np.concatenate([rng.permutation(size) for _ in range(-(-count // size))])[:count]
    passes = range(first // size, (first + count - 1) // size + 1)
    order = np.concatenate([generator(seed, worker, p, "shuffle").permutation(size) for p in passes])
    return order[first - passes[0] * size :][:count]
