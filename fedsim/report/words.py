"""How places in a table and accuracies are written."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from fedsim.config import Value

SHORT = {"clients": "K", "local-steps": "J", "batch-size": "batch"}
NOTHING = "–"


def label(axes: Sequence[str], place: Sequence[Value]) -> str:
    """A place in words, for instance ``K = 4, J = 10``; texts such as ``lars`` speak for themselves."""
    named = zip(axes, place, strict=False)
    return ", ".join(value if isinstance(value, str) else f"{SHORT.get(axis, axis)} = {value}" for axis, value in named)


def percent(fractions: Sequence[float]) -> str:
    """Their mean in %, with the standard deviation where there are several; a dash where there is none."""
    if not fractions:
        return NOTHING
    spread = f" ± {100 * statistics.stdev(fractions):.2f}" if len(fractions) > 1 else ""
    return f"{100 * statistics.fmean(fractions):.2f}{spread}"


def difference(fractions: Sequence[float], printed: float | None) -> str:
    """The mean in % less what the paper printed, signed; a dash where one of them is missing."""
    if not fractions or printed is None:
        return NOTHING
    return f"{100 * statistics.fmean(fractions) - printed:+.2f}".replace("-", "−")
