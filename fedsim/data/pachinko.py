"""The Pachinko allocation of images with classes and superclasses (Reddi et al. 2021, appendix F)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pachinko(
    labels: NDArray[np.int64],
    superclass_of: NDArray[np.int64],
    clients: int,
    alpha: float,
    beta: float,
    rng: np.random.Generator,
) -> list[NDArray[np.int64]]:
    """The images of each client: disjoint shards of equal size; the remaining images belong to no client.

    `labels`: (N,) classes; `superclass_of`: the superclass of each class. For one client after the other, probabilities
    of the superclasses are drawn from Dir(`alpha`) and of the classes in each from Dir(`beta`). Its images are then
    drawn with these probabilities, without replacement; classes with no images left are skipped.
    """
    pools = [rng.permutation(np.flatnonzero(labels == number)).tolist() for number in range(len(superclass_of))]
    left = np.array([len(pool) for pool in pools])
    members = [np.flatnonzero(superclass_of == number) for number in range(superclass_of.max() + 1)]
    shards = []
    for _ in range(clients):
        superclasses = rng.dirichlet([alpha] * len(members))
        classes = [rng.dirichlet([beta] * len(each)) for each in members]
        shard = []
        for one, other in rng.random((len(labels) // clients, 2)):
            chosen = _draw(superclasses, np.array([left[each].sum() for each in members]), one)
            number = members[chosen][_draw(classes[chosen], left[members[chosen]], other)]
            left[number] -= 1
            shard.append(pools[number].pop())
        shards.append(np.array(shard, np.int64))
    return shards


def _draw(shares: NDArray[np.float64], left: NDArray[np.int64], uniform: float) -> int:
    """The index that `uniform` in [0, 1) selects in proportion to `shares`, among those with images `left`."""
    open_shares = np.where(left > 0, shares, 0.0)
    if not open_shares.sum() > 0:  # all that have images left have the share 0
        open_shares = (left > 0).astype(float)
    sums = np.cumsum(open_shares)
    return int(np.searchsorted(sums, uniform * sums[-1], side="right"))
