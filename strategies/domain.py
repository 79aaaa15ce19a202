"""The values that an array may have."""

from __future__ import annotations

from typing import NamedTuple

LIMIT = 1e15  # of the magnitude of a value: far above those of any training, and its square is a float32


class Domain(NamedTuple):
    """The closed interval of the values that an array, or a metric, may have."""

    low: float = -LIMIT
    high: float = LIMIT


ANY, NOT_NEGATIVE = Domain(), Domain(low=0)
