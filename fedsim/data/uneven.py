"""Partitions with different classes or numbers of images per client: those of flwr-datasets, and `pachinko`.

A partition depends only on the labels, its name and arguments, the number of clients and the seed. It is kept in the
cache, so that the processes of a node, one for each message, do not draw it again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import io
import threading
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.config import Argument, Config, arguments_of
from fedsim.data.cache import Arrays, cached, discard_damaged
from fedsim.data.datasets import data_folder, load_dataset
from fedsim.data.official import coarse_labels
from fedsim.data.pachinko import pachinko
from fedsim.errors import UserError
from fedsim.registry import describe
from fedsim.rng import generator

Shards = list[NDArray[np.int64]]
EXAMPLES = {"alpha": "0.3", "group_size": "3", "num_classes_per_partition": "2", "partition_sizes": "100:200:300"}
OURS = ("num_partitions", "seed")  # arguments of partitioners that follow from other keys
_SILENT = threading.Lock()  # of one thread at a time: each puts back the streams and filters that it found
LABEL, SUPERCLASS = "label", "coarse_label"  # the columns that partition_by may name


@functools.lru_cache(maxsize=2)  # called by every client in every round
def uneven_shards(config: Config) -> Shards:
    """The training images of each client of `config` (resolved), whose `partition` is not iid."""
    if config.partition == "pachinko":
        _concentrations(config)  # an error comes before the data is read or downloaded
    labels = load_dataset(config, verify=False).train.labels.cpu().numpy()
    form = [config.partition, config.partition_args, config.clients, config.seed]
    form.append(hashlib.sha256(labels.tobytes()).hexdigest())
    discard_damaged([], form)

    def draw() -> Arrays:
        shards = _pachinko(config, labels) if config.partition == "pachinko" else _by_flower(config, labels)
        return {"images": np.concatenate(shards), "ends": np.cumsum([len(shard) for shard in shards])}

    arrays = cached([], ("images", "ends"), draw, form)
    return [np.array(shard) for shard in np.split(arrays["images"], arrays["ends"][:-1])]


def _concentrations(config: Config) -> tuple[float, float]:
    """alpha and beta of `pachinko`; raises UserError if an argument is unknown or the data set has no superclasses."""
    if config.dataset != "cifar100":
        raise UserError("partition = pachinko needs superclasses, which cifar100 alone has: give another partition")
    given = arguments_of(config.partition_args, words=True)
    alpha, beta = (given.pop(name, default) for name, default in (("alpha", 0.1), ("beta", 10.0)))
    if given or not all(isinstance(value, int | float) and value > 0 for value in (alpha, beta)):
        raise UserError(
            f"partition-args = {config.partition_args}: pachinko takes alpha and beta, numbers greater than 0"
        )
    return float(alpha), float(beta)  # type: ignore[arg-type]


def _pachinko(config: Config, labels: NDArray[np.int64]) -> Shards:
    alpha, beta = _concentrations(config)
    rng = generator(config.seed, 0, 0, "shard")
    return pachinko(labels, coarse_labels(data_folder(config)), config.clients, alpha, beta, rng)


def _by_flower(config: Config, labels: NDArray[np.int64]) -> Shards:
    """The shards that the partitioner of flwr-datasets makes of the images, which it is given in a seeded order."""
    try:
        import datasets
        from flwr_datasets import partitioner as partitioners
    except ImportError as error:
        raise UserError(
            f"partition = {config.partition} needs flwr-datasets on this machine ({describe(error)}): "
            "pip install flwr-datasets"
        ) from error
    kind = getattr(partitioners, "".join(map(str.capitalize, config.partition.split("-"))) + "Partitioner")
    order = generator(config.seed, 0, 0, "shard").permutation(len(labels))
    where = f"partition-args = {config.partition_args}: " if config.partition_args else ""
    arguments = _arguments(config, kind, where)
    column = arguments.get("partition_by", LABEL)
    values = coarse_labels(data_folder(config))[labels] if column == SUPERCLASS else labels
    try:
        # Warnings of draws that are tried again, and a progress bar
        with _SILENT, warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
            partitioner = kind(**arguments)
            partitioner.dataset = datasets.Dataset.from_dict({"image": order, column: values[order]})
            if (count := partitioner.num_partitions) != config.clients:
                raise UserError(
                    f"{where}partition = {config.partition} makes {count} clients, not {config.clients}: "
                    "make them equal"
                )
            return [np.array(partitioner.load_partition(k)["image"], np.int64) for k in range(count)]
    except UserError:
        raise
    except Exception as error:  # its checks raise errors of many kinds
        raise UserError(
            f"{where}partition = {config.partition} fails ({describe(error)}): give other --partition-args"
        ) from error


def _arguments(config: Config, kind: type, where: str) -> dict[str, Any]:
    """The arguments of the partitioner `kind`; raises UserError if one is unknown or missing."""
    parameters = inspect.signature(kind).parameters
    implied = {"num_partitions": config.clients, "partition_by": LABEL, "seed": config.seed}
    given = {name: _listed(name, value) for name, value in arguments_of(config.partition_args, words=True).items()}
    free = [name for name in parameters if name not in OURS]
    if unknown := given.keys() - set(free):
        takes = f"it takes {', '.join(free)}" if free else "it takes none"
        raise UserError(f"{where}partition = {config.partition} does not know {', '.join(unknown)}: {takes}")
    arguments = {name: value for name, value in implied.items() if name in parameters} | given
    needed = [name for name in free if parameters[name].default is inspect.Parameter.empty and name not in arguments]
    if needed:
        example = ",".join(f"{name}={EXAMPLES.get(name, 'VALUE')}" for name in needed)
        raise UserError(
            f"{where}partition = {config.partition} needs {', '.join(needed)}: give --partition-args {example}"
        )
    columns = (LABEL, SUPERCLASS) if config.dataset == "cifar100" else (LABEL,)
    if (column := arguments.get("partition_by", LABEL)) not in columns:
        raise UserError(f"{where}partition_by = {column}: {config.dataset} has {' and '.join(columns)}")
    return arguments


def _listed(name: str, value: Argument) -> Any:
    """`value`, but a tuple as a list, which flwr-datasets expects, and also a single one of ``partition_sizes``."""
    if isinstance(value, tuple):
        return list(value)
    return [value] if name == "partition_sizes" else value
