"""Which images each worker trains on, and in what order."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from fedsim.config import Config, Mode
from fedsim.data.datasets import load_dataset, task_of, training_examples
from fedsim.data.uneven import partition_of, partition_seed, uneven_shards
from fedsim.errors import UserError
from fedsim.rng import generator
from strategies.arguments import split_name


def shard(images: int, workers: int, worker: int, seed: int) -> NDArray[np.int64]:
    """The images of one worker, of IID shards that are disjoint and cover all images; sizes differ by at most one."""
    each, more = divmod(images, workers)
    first = worker * each + min(worker, more)
    return _shuffled(images, seed)[first : first + each + (worker < more)]


@functools.lru_cache(maxsize=2)  # called by every client in every round
def _shuffled(images: int, seed: int) -> NDArray[np.int64]:
    return generator(seed, 0, 0, "shard").permutation(images)


def is_iid(config: Config) -> bool:
    """Whether the shards of `config` are even, and so known without the labels."""
    return split_name(config.partition)[0] == "iid"


def shard_of(config: Config, worker: int) -> NDArray[np.int64]:
    """The images that a worker of `config` (resolved) trains on, by the key `partition`."""
    if is_iid(config):
        return shard(training_examples(config), config.clients, worker, partition_seed(partition_of(config), config))
    return uneven_shards(config)[worker]


def shard_sizes(config: Config) -> list[int]:
    """The number of images of each worker of `config`, resolved or not."""
    if is_iid(config):
        each, more = divmod(training_examples(config), config.clients)
        return [each + 1] * more + [each] * (config.clients - more)
    if config.device == "auto":
        config = config.changed({"device": "cpu"})
    return list(map(len, uneven_shards(config)))


def class_counts(config: Config) -> NDArray[np.int64]:
    """(K, classes) the number of images of each class that each client holds."""
    data = load_dataset(config)
    labels = data.train.groups.cpu().numpy()
    return np.stack([np.bincount(labels[shard_of(config, k)], minlength=data.classes) for k in range(config.clients)])


def images_held(config: Config) -> int:
    """The training images that the clients of `config` (resolved or not) hold together; an epoch counts these."""
    images = training_examples(config)
    held = partition_of(config).held(images, config.clients)
    return sum(shard_sizes(config)) if held is None else held


def images_of_epoch(config: Config, mode: Mode) -> int:
    """The images of an epoch of a run in `mode`."""
    return training_examples(config) if mode == "centralized" else images_held(config)


def images_left_out(config: Config) -> str:
    """A line that says how many images no client holds; empty where each is held."""
    held, images = images_held(config), training_examples(config)
    if held == images:
        return ""
    what = f"training {examples_of(config)}; an epoch counts these"
    return f"partition = {config.partition}: clients hold {held:,} of {images:,} {what}"


def examples_of(config: Config) -> str:
    """What the task of `config` calls its examples."""
    return task_of(config).metric.examples


def check_partition(config: Config) -> None:
    """Raise UserError if a client of `config` (resolved) would hold no images, or fewer than a batch."""
    if is_iid(config):
        check_shards(config, training_examples(config), config.clients)
        return
    what = examples_of(config)
    if config.clients > (images := training_examples(config)):
        raise UserError(f"clients = {config.clients} is more than the {images} training {what}: give fewer clients")
    sizes = shard_sizes(config)
    least = sizes.index(min(sizes))
    if sizes[least] == 0:
        raise UserError(
            f"partition = {config.partition} leaves client {least} without {what}: "
            "give it other arguments, another seed or fewer clients"
        )
    if config.batch_size > sizes[least] and not partition_of(config).small_shards:
        raise UserError(
            f"batch-size = {config.batch_size} is more than the {sizes[least]} {what} of client {least}: "
            "give a smaller batch-size, or the partition other arguments or small-shards=true"
        )


def check_shards(config: Config, images: int, workers: int) -> None:
    """Raise UserError if the even shards of `images` among `workers` would be smaller than a batch."""
    what = examples_of(config)
    if workers > images:
        raise UserError(f"clients = {workers} is more than the {images} training {what}: give fewer clients")
    if config.batch_size > images // workers and not partition_of(config).small_shards:
        raise UserError(
            f"batch-size = {config.batch_size} is more than a shard of {images // workers} {what}: "
            "give a smaller batch-size or fewer clients"
        )


def sample_order(size: int, first: int, count: int, seed: int, worker: int, shuffle_every: str) -> NDArray[np.int64]:
    """(count,) indices into a shard of `size` images: a worker's samples `first` to `first` + `count` of the run.

    `shuffle_every` = epoch: the run is a sequence of shuffled passes over the shard, in each of which a worker that
    takes part in every round sees each image once. A worker that is not sampled in a round skips its samples.
    `shuffle_every` = round: a new shuffled pass starts at `first`.
    """
    if shuffle_every == "round":
        rng = generator(seed, worker, first, "shuffle")
        return np.concatenate([rng.permutation(size) for _ in range(-(-count // size))])[:count]
    passes = range(first // size, (first + count - 1) // size + 1)
    order = np.concatenate([generator(seed, worker, p, "shuffle").permutation(size) for p in passes])
    return order[first - passes[0] * size :][:count]
