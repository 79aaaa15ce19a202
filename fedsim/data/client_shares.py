"""Each client's share of the test data: of each class or document, the part that it has of the training data."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.config import Config
from fedsim.data.datasets import load_dataset
from fedsim.data.partition import class_counts
from fedsim.data.task import Examples
from fedsim.rng import generator


class ClientShares(NamedTuple):
    """(N,) the client that has each test example, and the number of clients."""

    owners: Tensor
    clients: int


@functools.lru_cache(maxsize=2)  # each client asks for its own
def client_shares(config: Config) -> ClientShares:
    """The shares of `config` (resolved): each test example is in one of them.

    The numbers of each group are by largest remainder. Which examples these are, and which of equal remainders is the
    larger, is drawn by the seed. A group of which no client trains on any example is divided evenly.
    """
    groups = load_dataset(config, verify=False).test.groups.cpu().numpy()
    owners = np.empty(len(groups), np.int64)
    for group, held in enumerate(class_counts(config).T):
        rng = generator(config.seed, 0, group, "test-share")
        index = rng.permutation(np.flatnonzero(groups == group))
        sizes = in_proportion(len(index), held if held.any() else np.ones_like(held), rng)
        owners[index] = np.repeat(np.arange(config.clients), sizes)
    return ClientShares(torch.from_numpy(owners), config.clients)


def in_proportion(total: int, to: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """(K,) whole numbers that sum to `total`, in proportion `to` K others by largest remainder."""
    sizes, remainders = np.divmod(total * to, to.sum())
    order = np.lexsort((rng.permutation(len(to)), -remainders))
    sizes[order[: total - sizes.sum()]] += 1
    return sizes


def client_share(config: Config, worker: int) -> Examples:
    """The test examples of one client."""
    owners, _ = client_shares(config)
    return load_dataset(config, verify=False).test.subset(np.flatnonzero(owners.numpy() == worker))
