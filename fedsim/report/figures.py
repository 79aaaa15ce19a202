"""Figures from the records: each a PNG, the numbers in it as CSV, and a caption. Lines of one column share a panel."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedsim.experiments.study import TWIN
from fedsim.records import Row
from fedsim.report.load import CellResults, Group, Place, Result
from fedsim.report.network import traffic
from fedsim.report.paper_values import PaperValue, paper_value
from fedsim.report.words import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130


@dataclass(frozen=True)
class Plot:
    """A figure and the numbers that it shows."""

    name: str
    caption: str
    figure: Figure
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Axis(NamedTuple):
    """What a curve runs along: a quantity of a row."""

    name: str
    words: str
    value: Callable[[CellResults, Result, Row], float | None]


def _sent(cell: CellResults, run: Result, row: Row) -> float | None:
    found = traffic(cell, run, row)
    return None if found is None else found.bytes_up + found.bytes_down


def _syncs(cell: CellResults, run: Result, row: Row) -> float | None:
    found = traffic(cell, run, row)
    return None if found is None else found.syncs


EPOCHS = Axis("epochs", "epochs", lambda cell, run, row: float(row["epoch"]))
SYNCS = Axis("syncs", "syncs", _syncs)
BYTES = Axis("bytes", "bytes sent by all workers, both ways", _sent)


class Point(NamedTuple):
    """One place of a mean curve."""

    x: float
    mean: float
    spread: float
    runs: int


def plots_of(group: Group) -> dict[str, Callable[[], Plot]]:
    """Each figure that the group's records allow, in the report's order: its name and how to make it."""
    makers: dict[str, Callable[[], Plot]] = {}
    if any(run.tested for run in group.runs):
        makers[f"{group.name}-epochs"] = lambda: plot_curves(group, EPOCHS)
        if any(run.config["mode"] == "localsgd" for run in group.runs):
            makers[f"{group.name}-syncs"] = lambda: plot_curves(group, SYNCS)
            makers[f"{group.name}-bytes"] = lambda: plot_curves(group, BYTES)
            if any(cell.finished for cell in group.cells):
                makers[f"{group.name}-pareto"] = lambda: plot_pareto(group)
    if any(cell.values("final_test_accuracy") for cell in group.cells) and len(group.cells) > 1:
        makers[f"{group.name}-accuracy"] = lambda: plot_accuracy(group)
    return makers


def save_plot(plot: Plot, out: Path, command: str) -> None:
    """``NAME.png`` and ``NAME.csv`` in `out`; the PNG says which command made it."""
    plot.figure.savefig(out / f"{plot.name}.png", dpi=DPI, metadata={"Description": command})
    with (out / f"{plot.name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(plot.header)
        writer.writerows(plot.rows)


def mean_curve(cell: CellResults, axis: Axis) -> list[Point]:
    """The mean test accuracy of the cell's runs along `axis`, where all of them have a test.

    Runs that are finished, or, where none is, those that have begun: an unfinished one cuts no mean short.
    """
    runs = cell.finished or [run for run in cell.runs if run.tested]
    by_round = [{row["round"]: row for row in run.tested} for run in runs]
    points = []
    for round in sorted(set.intersection(*map(set, by_round)) if by_round else set()):
        rows = [rows[round] for rows in by_round]
        accuracies = [float(row["test_accuracy"]) for row in rows]
        x = [axis.value(cell, run, row) for run, row in zip(runs, rows, strict=True)]
        known = [value for value in x if value is not None]
        if len(known) == len(x):
            spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
            points.append(Point(statistics.fmean(known), statistics.fmean(accuracies), spread, len(rows)))
    return points


def plot_curves(group: Group, axis: Axis) -> Plot:
    """Test accuracy along `axis`: a panel for each column of the table, a line for each row."""
    begun = {cell.place[: group.across] for cell in group.cells if any(run.tested for run in cell.runs)}
    columns = [column for column in group.columns if column in begun]
    figure, panels = _panels(len(columns))
    colors = _colors(group.rows)
    rows: list[Sequence[Any]] = []
    for column, axes in zip(columns, panels, strict=True):
        axes.set_title(label(group.axes, column) or group.title, fontsize=10)
        for row in group.rows:
            cell = group.at(column, row)
            points = mean_curve(cell, axis) if cell else []
            if not points or (axis is not EPOCHS and not any(point.x for point in points)):
                continue
            _draw(axes, points, colors[row], label(group.axes[group.across :], row) or "all", row[-1:] == (TWIN,))
            rows += [(*column, *row, *point) for point in points]
        axes.set_xlabel(axis.words)
        if axis is not EPOCHS and axes.lines:
            _log_scale(axes)
    panels[0].set_ylabel(f"{group.tested_on} accuracy, %")
    _legend(figure, panels)
    spread = "; bands: one standard deviation over the seeds" if any(row[-1] > 1 for row in rows) else ""
    computed = axis is not EPOCHS and group.has_twins
    twin = "; dashed: the large batch as data-parallel SGD, its traffic computed" if computed else ""
    caption = f"Accuracy on {group.tested_on} images against {axis.words}{spread}{twin}."
    header = (*group.axes, axis.name, "accuracy_mean", "accuracy_std", "runs")
    return Plot(f"{group.name}-{axis.name}", caption, figure, header, rows)


def plot_accuracy(group: Group) -> Plot:
    """Accuracy by place in the table: the final one, or, beside the paper's values, the best as the paper's are."""
    paper = {cell.place: found for cell in group.cells if (found := paper_value(group, cell))}
    which = "best" if paper else "final"
    values = {cell.place: [100 * v for v in cell.values(f"{which}_test_accuracy")] for cell in group.cells}
    spread = " Bars: one standard deviation over the seeds." if any(len(v) > 1 for v in values.values()) else ""
    hollow = " Hollow: the paper's." if paper else ""
    caption = f"{which.capitalize()} accuracy on {group.tested_on} images.{spread}{hollow}"
    words = f"{which} accuracy, %"
    return by_place(group, values, f"{group.name}-accuracy", caption, words, paper=paper)


def by_place(
    group: Group,
    values: Mapping[Place, list[float]],
    name: str,
    caption: str,
    words: str,
    log: bool = False,
    paper: Mapping[Place, PaperValue] | None = None,
) -> Plot:
    """Means and standard deviations at the places of the table: its rows along x, a line for each column."""
    figure, (axes,) = _panels(1, width=6.4)
    rows: list[Sequence[Any]] = []
    for index, column in enumerate(group.columns):
        aside = 0.06 * (index - (len(group.columns) - 1) / 2)  # so that no bar hides another
        cells = [(tick + aside, cell) for tick, row in enumerate(group.rows) if (cell := group.at(column, row))]
        shown = [(tick, cell.place, *_mean_and_spread(values.get(cell.place, []))) for tick, cell in cells]
        rows += [(*place, mean, spread, len(values[place])) for _, place, mean, spread in shown if values.get(place)]
        series = label(group.axes, column) or "runs"
        _draw_column(axes, shown, series, f"C{index}")
        printed = [(tick, paper[cell.place].best) for tick, cell in cells if paper and cell.place in paper]
        if printed:
            x, y = zip(*printed, strict=True)
            axes.plot(x, y, "o:", mfc="none", color=f"C{index}", lw=0.8, ms=8, label=f"{series}, paper")
    axes.set_xticks(range(len(group.rows)), [" ".join(map(str, row)) for row in group.rows])
    axes.set_xlabel(", ".join(group.axes[group.across :]))
    axes.set_ylabel(words)
    if log and rows:
        axes.set_yscale("log")
    _legend(figure, [axes])
    return Plot(name, caption, figure, (*group.axes, "mean", "std", "runs"), rows)


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation; not a number where there is nothing, so that a line breaks there."""
    if not values:
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _draw_column(axes: Axes, shown: Sequence[tuple[float, Place, float, float]], words: str, color: str) -> None:
    """A line through the cells that follow one another, and the twin, which does not, as a square."""
    for twin in (False, True):
        own = [(tick, mean, spread) for tick, place, mean, spread in shown if (place[-1:] == (TWIN,)) == twin]
        if any(not math.isnan(mean) for _, mean, _ in own):
            ticks, means, spreads = zip(*own, strict=True)
            bars = [spread or math.nan for spread in spreads]  # no bar where there is one seed
            form = "s" if twin else "o-"
            axes.errorbar(ticks, means, bars, fmt=form, mfc="none" if twin else color, capsize=3, color=color)
            if not twin:
                axes.plot([], [], "o-", color=color, label=words)


def plot_pareto(group: Group) -> Plot:
    """Final accuracy against what was sent for it, and the front: no other cell is as good for less."""
    figure, panels = _panels(2)
    rows: list[Sequence[Any]] = []
    for axis, axes in zip((BYTES, SYNCS), panels, strict=True):
        points = _final_points(group, axis)
        front = pareto_front([(x, y) for _, x, y in points])
        for index, column in enumerate(group.columns):
            own = [point for point in points if point[0].place[: group.across] == column]
            for cell, x, y in own:
                twin = cell.place[-1:] == (TWIN,)
                axes.plot(x, y, "s" if twin else "o", mfc="none" if twin else f"C{index}", color=f"C{index}")
                words = "" if twin else " ".join(map(str, cell.place[group.across :]))
                axes.annotate(words, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
                rows.append((axis.name, *cell.place, x, y, (x, y) in front))
            if own:
                axes.plot([], [], "o", color=f"C{index}", label=label(group.axes, column) or "runs")
        if front:
            axes.plot(*zip(*front, strict=True), "k--", lw=0.8, zorder=0, label="front", drawstyle="steps-post")
        axes.set_xlabel(axis.words)
        if points:
            _log_scale(axes)
    panels[0].set_ylabel("final accuracy, %")
    _legend(figure, panels)
    down = ", ".join(group.axes[group.across :])
    twins = " Squares: the large batch as data-parallel SGD, its traffic computed." if group.has_twins else ""
    words = f"Final accuracy on {group.tested_on} images, mean over the seeds, against what was sent"
    caption = f"{words}; the numbers at the points: {down}.{twins}"
    header = ("against", *group.axes, "sent", "accuracy_percent", "on_the_front")
    return Plot(f"{group.name}-pareto", caption, figure, header, rows)


def _final_points(group: Group, axis: Axis) -> list[tuple[CellResults, float, float]]:
    """Cell, cost and mean final accuracy in % of each cell that has a finished run and sends anything."""
    points = []
    for cell in group.cells:
        accuracies = cell.values("final_test_accuracy")
        x = [axis.value(cell, run, run.rows[-1]) for run in cell.finished if run.rows]
        known = [value for value in x if value]
        if accuracies and known:
            points.append((cell, statistics.fmean(known), 100 * statistics.fmean(accuracies)))
    return points


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, gain) that no other beats: each costs more than the one before and gains more."""
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front


def _panels(count: int, width: float = 3.6) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # a second to import, and only figures need it

    across = min(count, 3)
    down = -(-count // across) if count else 1
    figure = Figure(figsize=(max(width * max(across, 1) + 1.2, 5.5), 3.4 * down), layout="constrained")
    grid = figure.subplots(down, max(across, 1), sharey=True, squeeze=False)
    panels = list(grid.flatten())
    for axes in panels[count:]:
        axes.remove()
    for axes in panels[:count]:
        axes.grid(alpha=0.3)
    return figure, panels[:count]


def _log_scale(axes: Axes) -> None:
    """A logarithmic x axis in k, M and G, with more ticks where it spans little."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _colors(rows: Sequence[Place]) -> dict[Place, Any]:
    from matplotlib import colormaps

    ordered = [row for row in rows if row[-1:] != (TWIN,)]
    found = {row: colormaps["viridis"](0.9 * i / max(len(ordered) - 1, 1)) for i, row in enumerate(ordered)}
    return {row: found.get(row, "black") for row in rows}


def _draw(axes: Axes, points: Sequence[Point], color: Any, words: str, dashed: bool) -> None:
    x = [point.x for point in points]
    mean = [100 * point.mean for point in points]
    spread = [100 * point.spread for point in points]
    marker = "o" if len(points) < 12 else ""
    axes.plot(x, mean, color=color, label=words, lw=1.3, ls="--" if dashed else "-", marker=marker, ms=3)
    if any(spread):
        low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend for all panels, beside them."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, words in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(words, handle)
    if found:
        figure.legend(
            handles=list(found.values()), labels=list(found), loc="outside right upper", fontsize=8, frameon=False
        )
