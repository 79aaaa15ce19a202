"""Names of series beside their points, where they cover the least of what is drawn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray

from fedsim.report.drawing import CHARACTER

LINE = 0.16  # inches, the height of a line of text
NEAR, FAR = 0.11, 0.5  # inches from a point
ON_A_LINE = 24  # places at which the line between two points is looked at
WEIGHT = 12  # of a point or a bar, against one place on a line
MARKER = 0.05  # inches around a point
LEADER = {"arrowstyle": "-", "lw": 0.6, "shrinkA": 0, "shrinkB": 4}  # from a name that is not beside its point

Array = NDArray[np.float64]


def name_series(panel: Axes, points: pd.DataFrame, colors: Mapping[str, str]) -> None:
    """Write the name of each `column` of `points` (`x`, `mean`, with bars `std`) in its colour beside one of them.

    The figure must be laid out. The candidates are places around every point, near and far; the best one has the least
    of other names, of points and of lines in its box, is within the panel, and near.
    """
    dpi = panel.figure.dpi
    series = {str(name): own[["x", "mean"]].to_numpy(float) for name, own in points.groupby("column", sort=False)}
    inches = {name: panel.transData.transform(own) / dpi for name, own in series.items()}
    bars = [points["mean"] + sign * points["std"] for sign in (-1, -0.5, 0.5, 1)]
    of_bars = panel.transData.transform(np.concatenate([np.stack([points["x"], bar], axis=1) for bar in bars])) / dpi
    edge = panel.get_window_extent().get_points() / dpi
    drawn = np.concatenate([*map(_along, inches.values()), *[of_bars] * WEIGHT])
    boxes = np.empty((0, 2, 2))
    for name, own in sorted(inches.items(), key=lambda item: -len(item[0])):
        size = np.array([CHARACTER * len(name), LINE])
        places = itertools.product(range(len(own)), _offsets(size))
        number, offset = min(places, key=lambda place: _cost(own[place[0]], place[1], size, drawn, boxes, edge))
        middle = own[number] + offset
        boxes = np.concatenate([boxes, [[middle - size / 2, middle + size / 2]]])
        far = _distance(offset, size) > 2 * NEAR
        panel.annotate(
            name, series[name][number], tuple(72 * offset), textcoords="offset points", color=colors[name],
            ha="center", va="center", arrowprops={**LEADER, "color": colors[name]} if far else None,
        )  # fmt: skip


def _offsets(size: Array) -> Iterator[Array]:
    """From a point to the middle of a name beside it, in inches: near and far, in each direction."""
    for reach, angle in itertools.product(np.linspace(NEAR, FAR, 5), np.linspace(0, 2 * np.pi, 12, endpoint=False)):
        direction = np.array([np.cos(angle), np.sin(angle)])
        yield direction * reach + np.where(np.abs(direction) > 0.3, np.sign(direction), 0) * size / 2


def _distance(offset: Array, size: Array) -> float:
    """From a point to the nearest side of a name."""
    return float(np.hypot(*np.maximum(np.abs(offset) - size / 2, 0)))


def _along(points: Array) -> Array:
    """Points along the lines between `points`, in inches."""
    shares = np.linspace(0, 1, ON_A_LINE)[:, None]
    lines = [first + shares * (second - first) for first, second in itertools.pairwise(points)]
    return np.concatenate([*lines, *[points] * WEIGHT])


def _cost(point: Array, offset: Array, size: Array, drawn: Array, boxes: Array, edge: Array) -> float:
    """How bad a place is for a name: what it covers, most of all other names and the edge, then its distance."""
    low, high = point + offset - size / 2, point + offset + size / 2
    covered = ((drawn > low - MARKER) & (drawn < high + MARKER)).all(axis=1).sum()
    names = ((boxes[:, 0] < high) & (boxes[:, 1] > low)).all(axis=1).sum()
    outside = (low < edge[0]).any() or (high > edge[1]).any()
    return float(covered + 200 * names + 400 * outside + 20 * _distance(offset, size))
