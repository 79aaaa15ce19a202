"""Which images each worker trains on, and in which order."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.rng import generator


def shard(images: int, workers: int, worker: int, seed: int) -> NDArray[np.int64]:
    """The images of one worker: IID shards, disjoint, covering, their sizes at most one apart."""
    return np.array_split(_shuffled(images, seed), workers)[worker]


@functools.lru_cache(maxsize=2)  # every client asks in every round
def _shuffled(images: int, seed: int) -> NDArray[np.int64]:
    return generator(seed, 0, 0, "shard").permutation(images)


def check_shards(config: Config, images: int, workers: int) -> None:
    """Fail where `images` cannot give every one of `workers` a shard of a batch or more."""
    if workers > images:
        raise UserError(f"clients = {workers} is more than the {images} training images: give fewer clients")
    if config.batch_size > images // workers:
        raise UserError(
            f"batch-size = {config.batch_size} is more than a shard of {images // workers} images: "
            "give a smaller batch-size or fewer clients"
        )


def sample_order(size: int, first: int, count: int, seed: int, worker: int, shuffle_every: str) -> NDArray[np.int64]:
    """(count,) which of a shard's `size` images a worker takes, its samples `first` to `first` + `count` of the run.

    `shuffle_every` = epoch: the samples of a run are shuffled passes over the shard, one after the other, so that a
    worker that takes part in every round sees every image once before any twice. A worker that a round does not sample
    skips the samples of that round. `shuffle_every` = round: a new shuffled pass begins at `first`.
    """
    if shuffle_every == "round":
        rng = generator(seed, worker, first, "shuffle")
        return np.concatenate([rng.permutation(size) for _ in range(-(-count // size))])[:count]
    passes = range(first // size, (first + count - 1) // size + 1)
    order = np.concatenate([generator(seed, worker, p, "shuffle").permutation(size) for p in passes])
    return order[first - passes[0] * size :][:count]
