"""Partitions with different classes or numbers of images per client: those of flwr-datasets, and `Pachinko`.

A partition depends only on the labels, its text, the number of clients and the seed. It is kept in the cache, so that
the processes of a node, one for each message, do not draw it again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import io
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedsim.config import Config
from fedsim.data.cache import Arrays, cached, discard_damaged
from fedsim.data.datasets import load_dataset
from fedsim.data.folder import data_folder
from fedsim.data.official import coarse_labels
from fedsim.data.pachinko import pachinko
from fedsim.errors import UserError
from fedsim.own_code import own_code
from fedsim.registry import describe, failures_of, is_own
from fedsim.rng import generator
from strategies.arguments import above, at_least, check_fields

Shards = list[NDArray[np.int64]]
_SILENT = threading.Lock()  # of one thread at a time: each puts back the streams and filters that it found
LABEL, SUPERCLASS = "label", "coarse_label"  # the columns that partition_by may name
Alpha = Annotated[tuple[float, ...], above(0)]
By = Literal["label", "coarse_label"]


class Labelled(NamedTuple):
    """What a partition knows of the training images: their classes, (N,), and the superclass of each class."""

    labels: NDArray[np.int64]
    superclass_of: Callable[[], NDArray[np.int64]]  # raises UserError where the data set has none


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Who holds which training images; one's own is a frozen dataclass that extends it.

    `seed` replaces the run's, so that runs of several seeds train on one split. With `small_shards` a client may hold
    fewer images than a batch, which then has some of them more than once.
    """

    seed: Annotated[int, at_least(0)] | None = None
    small_shards: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def held(self, images: int, clients: int) -> int | None:
        """How many of the images the clients hold together; None where only the shards tell."""
        return None

    def check(self, config: Config) -> None:
        """Raise UserError where it does not fit a run, before the data is read."""

    def shards(self, images: Labelled, clients: int, seed: int) -> Shards:
        """The images of each client, by their numbers."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Iid(Partition):
    """Even shards of the shuffled images; their sizes differ by at most one."""

    def held(self, images: int, clients: int) -> int:
        return images


@dataclass(frozen=True)
class Pachinko(Partition):
    """Shards of equal size by superclasses, drawn from Dir(alpha), and classes, from Dir(beta) (Reddi et al. 2021)."""

    alpha: Annotated[float, above(0)] = 0.1
    beta: Annotated[float, above(0)] = 10.0

    def held(self, images: int, clients: int) -> int:
        return clients * (images // clients)

    def check(self, config: Config) -> None:
        _check_superclasses(config, "needs superclasses")

    def shards(self, images: Labelled, clients: int, seed: int) -> Shards:
        rng = generator(seed, 0, 0, "shard")
        return pachinko(images.labels, images.superclass_of(), clients, self.alpha, self.beta, rng)


def _check_superclasses(config: Config, what: str) -> None:
    if config.dataset != "cifar100":
        raise UserError(f"partition = {config.partition} {what}, which cifar100 alone has: give another partition")


class OfFlower(Partition):
    """The partitioner of flwr-datasets of this name, which is given the images in a seeded order."""

    def check(self, config: Config) -> None:
        if getattr(self, "partition_by", LABEL) == SUPERCLASS:
            _check_superclasses(config, "goes by superclasses")

    def shards(self, images: Labelled, clients: int, seed: int) -> Shards:
        import datasets
        from flwr_datasets import partitioner as partitioners

        kind = getattr(partitioners, f"{type(self).__name__}Partitioner")
        order = generator(seed, 0, 0, "shard").permutation(len(images.labels))
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        arguments = {"num_partitions": clients, "partition_by": LABEL, **self._of_flower(own), "seed": seed}
        taken = inspect.signature(kind).parameters
        column = arguments["partition_by"]
        values = images.superclass_of()[images.labels] if column == SUPERCLASS else images.labels
        # Warnings of draws that are tried again, and a progress bar
        with _SILENT, warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
            partitioner = kind(**{name: value for name, value in arguments.items() if name in taken})
            partitioner.dataset = datasets.Dataset.from_dict({"image": order, column: values[order]})
            count = partitioner.num_partitions
            return [np.array(partitioner.load_partition(k)["image"], np.int64) for k in range(count)]

    def _of_flower(self, own: dict[str, Any]) -> dict[str, Any]:
        """The arguments as flwr-datasets expects them: lists, and a single concentration as a number."""
        listed = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
        if len(listed.get("alpha", "")) == 1:
            [listed["alpha"]] = listed["alpha"]
        return listed


class _HoldsAll(OfFlower):
    def held(self, images: int, clients: int) -> int:
        return images


@dataclass(frozen=True)
class Dirichlet(_HoldsAll):
    """The clients' shares of each class are drawn from Dir(alpha); one alpha, or one for each client."""

    alpha: Alpha
    min_partition_size: Annotated[int, at_least(0)] = 10
    self_balancing: bool = False
    shuffle: bool = True
    partition_by: By = "label"


@dataclass(frozen=True)
class InnerDirichlet(OfFlower):
    """Given sizes; the classes of each client are drawn from Dir(alpha)."""

    partition_sizes: Annotated[tuple[int, ...], at_least(1)]
    alpha: Alpha
    shuffle: bool = True
    partition_by: By = "label"


@dataclass(frozen=True)
class Pathological(OfFlower):
    """So many classes each."""

    num_classes_per_partition: Annotated[int, at_least(1)]
    class_assignment_mode: Literal["random", "deterministic", "first-deterministic"] = "random"
    shuffle: bool = True
    partition_by: By = "label"


@dataclass(frozen=True)
class Shard(OfFlower):
    """So many slices each of the images sorted by class (McMahan et al. 2017)."""

    num_shards_per_partition: Annotated[int, at_least(1)] | None = None
    shard_size: Annotated[int, at_least(1)] | None = None
    keep_incomplete_shard: bool = False
    shuffle: bool = True
    partition_by: By = "label"


@dataclass(frozen=True)
class Size(OfFlower):
    """Given sizes."""

    partition_sizes: Annotated[tuple[int, ...], at_least(1)]


@dataclass(frozen=True)
class Linear(_HoldsAll):
    """Client k holds a share in proportion to k."""


@dataclass(frozen=True)
class Square(_HoldsAll):
    """Client k holds a share in proportion to the square of k."""


@dataclass(frozen=True)
class Exponential(_HoldsAll):
    """Client k holds a share in proportion to exp(k)."""


@dataclass(frozen=True)
class Continuous(_HoldsAll):
    """Classes as numbers in a row, cut into shards; the lower `strictness`, from 0 to 1, the more they mix."""

    strictness: Annotated[float, at_least(0)]
    shuffle: bool = True
    partition_by: By = "label"


@dataclass(frozen=True)
class NaturalId(_HoldsAll):
    """A class, or a superclass, for each client."""

    partition_by: By = "label"


@dataclass(frozen=True)
class GroupedNaturalId(OfFlower):
    """So many classes, or superclasses, for each client."""

    group_size: Annotated[int, at_least(1)]
    mode: Literal["allow-smaller", "allow-bigger", "drop-reminder", "strict"] = "allow-smaller"
    sort_unique_ids: bool = False
    partition_by: By = "label"


PARTITIONS: dict[str, type[Partition]] = {
    "iid": Iid,
    "dirichlet": Dirichlet,
    "inner-dirichlet": InnerDirichlet,
    "pathological": Pathological,
    "shard": Shard,
    "size": Size,
    "linear": Linear,
    "square": Square,
    "exponential": Exponential,
    "continuous": Continuous,
    "natural-id": NaturalId,
    "grouped-natural-id": GroupedNaturalId,
    "pachinko": Pachinko,
}


def partition_of(config: Config) -> Partition:
    """The partition of `config`; raises UserError where it cannot be made, or does not fit the run."""
    partition: Partition = config.made("partition")
    partition.check(config)
    return partition


def partition_seed(partition: Partition, config: Config) -> int:
    """The seed of the shards."""
    return config.seed if partition.seed is None else partition.seed


@functools.lru_cache(maxsize=2)  # called by every client in every round
def uneven_shards(config: Config) -> Shards:
    """The training images of each client of `config` (resolved), whose `partition` is not iid."""
    partition = partition_of(config)  # an error comes before the data is read or downloaded
    labels = load_dataset(config, verify=False).train.groups.cpu().numpy()
    images = Labelled(labels, lambda: coarse_labels(data_folder(config)))
    seed = partition_seed(partition, config)
    form = [config.partition, config.clients, seed, hashlib.sha256(labels.tobytes()).hexdigest()]
    if is_own(config.partition):
        form.append(own_code(config))
    discard_damaged([], form)

    def draw() -> Arrays:
        shards = _drawn(config, partition, images, seed)
        return {"images": np.concatenate(shards), "ends": np.cumsum([len(shard) for shard in shards])}

    arrays = cached([], ("images", "ends"), draw, form)
    return [np.array(shard) for shard in np.split(arrays["images"], arrays["ends"][:-1])]


def _drawn(config: Config, partition: Partition, images: Labelled, seed: int) -> Shards:
    """The shards that `partition` draws; raises UserError where it fails, or they cannot be those of a run."""
    what = f"partition = {config.partition}"
    try:
        with failures_of(f"{what} fails", remedy="give other arguments"):
            shards = partition.shards(images, config.clients, seed)
            again = partition.shards(images, config.clients, seed) if is_own(config.partition) else shards
    except UserError as error:
        if isinstance(error.__cause__, ImportError):
            raise UserError(
                f"{what} needs flwr-datasets on this machine ({describe(error.__cause__)}): pip install flwr-datasets"
            ) from error
        raise
    if len(shards) != config.clients:
        raise UserError(f"{what} makes {len(shards)} clients, not {config.clients}: make them equal")
    found = [np.asarray(shard) for shard in shards]
    every = np.concatenate(found) if found else np.empty(0, np.int64)
    if every.dtype.kind not in "iu" or len(np.unique(every)) < len(every):
        raise UserError(f"{what} gives other things than numbers of images, each to one client")
    if len(every) and not 0 <= every.min() <= every.max() < len(images.labels):
        raise UserError(f"{what} gives images that there are not: they are counted from 0 to {len(images.labels) - 1}")
    if not all(np.array_equal(*pair) for pair in zip(found, again, strict=True)):
        raise UserError(f"{what} gives other shards when it is called again: draw with the seed that it is given")
    return [shard.astype(np.int64) for shard in found]
