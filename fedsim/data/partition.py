"""Which images each worker trains on, and in which order."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.rng import numpy_stream


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
