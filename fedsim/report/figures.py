"""The figures of a table of results, each with a caption and its numbers."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from fedsim.report.load import printable
from fedsim.report.result_table import ResultTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 144
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito 2008, for colour-blind eyes
MARKERS = "osD^vP"
WIDTHS = {1: 5.0, 2: 8.0, 3: 9.6}  # inches, by the panels side by side
CHARACTER = 0.085  # inches, the approximate width of one
MOST_IN_LEGEND = 24
LONGEST_LABEL = 14  # characters beside a point


@dataclass(frozen=True)
class Plot:
    """A figure, its caption, and the numbers that it shows."""

    name: str
    caption: str
    figure: Figure
    numbers: pd.DataFrame

    def png(self, command: str) -> bytes:
        """The figure as PNG, with the `command` that makes it as its description."""
        from matplotlib.text import Text

        for text in self.figure.findobj(Text):
            text.set_parse_math(False)  # names may contain a $
        file = io.BytesIO()
        self.figure.savefig(file, dpi=DPI, metadata={"Description": printable(command)})
        return file.getvalue()


class XAxis(NamedTuple):
    """The x-axis of a curve: its name, a column of `ResultTable.rows`, and its label."""

    name: str
    column: str
    label: str


EPOCHS = XAxis("epochs", "epoch", "epochs")
SYNCS = XAxis("syncs", "network_syncs", "syncs")
BYTES = XAxis("bytes", "network_bytes", "bytes sent by all workers, both ways")


def plots_of(table: ResultTable) -> dict[str, Callable[[], Plot]]:
    """Name -> function that makes it, for every figure that the records allow, in the order of the report."""
    makers: dict[str, Callable[[], Plot]] = {}
    finished = table.counted[table.counted["finished"]]
    if table.rows["test_accuracy"].notna().any():
        makers[f"{table.name}-epochs"] = lambda: plot_curves(table, EPOCHS)
        if table.with_traffic:
            makers[f"{table.name}-syncs"] = lambda: plot_curves(table, SYNCS)
            makers[f"{table.name}-bytes"] = lambda: plot_curves(table, BYTES)
    if (finished["network_bytes"] > 0).any():
        makers[f"{table.name}-pareto"] = lambda: plot_pareto(table)
    if not finished.empty and len(table.cells) > 1:
        makers[f"{table.name}-accuracy"] = lambda: plot_accuracy(table)
    return makers


def mean_curves(table: ResultTable, axis: XAxis) -> pd.DataFrame:
    """The mean test accuracy over each cell's counted runs, at the rounds in which all of them were tested.

    Columns: `cell`, the name of the axis, `accuracy_mean`, `accuracy_std` (0 for one run), `runs`.
    """
    tested = table.rows[table.rows["test_accuracy"].notna() & table.rows["run"].isin(table.counted.index)]
    points = tested.groupby(["cell", "round"], as_index=False).agg(
        **{axis.name: (axis.column, "mean")},
        known=(axis.column, "count"),
        accuracy_mean=("test_accuracy", "mean"),
        accuracy_std=("test_accuracy", "std"),
        runs=("run", "count"),
    )
    all_runs = points["cell"].map(tested.groupby("cell")["run"].nunique())
    points = points[(points["runs"] == all_runs) & (points["known"] == all_runs)]
    if axis is not EPOCHS:
        points = points[points.groupby("cell")[axis.name].transform("max") > 0]
    return points.drop(columns=["round", "known"]).fillna({"accuracy_std": 0.0})


def plot_curves(table: ResultTable, axis: XAxis) -> Plot:
    """Test accuracy against `axis`: a panel for each column of the table, a line for each row."""
    points = mean_curves(table, axis).join(table.cells[["column", "row", "baseline"]], on="cell")
    columns, rows = _ordered(table, points, "column"), _ordered(table, points, "row")
    figure, panels = _panels(len(columns))
    styles = _line_styles(table, rows)
    for column, panel in zip(columns, panels, strict=True):
        panel.set_title(column, fontsize="medium")
        for row in rows:
            curve = points[(points["column"] == column) & (points["row"] == row)]
            if not curve.empty:
                _draw_curve(panel, curve, axis, row or "all runs", styles[row])
        panel.set_xlabel(axis.label)
        if axis is not EPOCHS:
            _log_scale(panel, "x")
    for panel in panels[:: _columns_of(len(panels))]:
        panel.set_ylabel(f"{table.tested_on} accuracy, %")
    _legend(figure, panels)
    bands = "; bands: one standard deviation over seeds" if (points["runs"] > 1).any() else ""
    unfinished = "; unfinished runs included" if not table.counted["finished"].all() else ""
    caption = (
        f"Accuracy on {table.tested_on} images against {axis.label}{bands}{unfinished}{_baseline_note(table, axis)}."
    )
    numbers = _with_coords(table, points, [axis.name, "accuracy_mean", "accuracy_std", "runs"])
    return Plot(f"{table.name}-{axis.name}", caption, figure, numbers)


def plot_accuracy(table: ResultTable) -> Plot:
    """Accuracy of finished runs by cell: the final one, or the best where there are values of the paper to compare."""
    paper = table.cells["paper"].map(lambda value: value.best, na_action="ignore").astype(float)
    which = "best" if paper.notna().any() else "final"
    finished = table.runs[table.runs["finished"]]
    values = (100 * finished[f"{which}_test_accuracy"]).dropna().groupby(finished["cell"]).agg(["mean", "std", "count"])
    deviation = " Bars: one standard deviation over seeds." if (values["count"] > 1).any() else ""
    hollow = " Hollow: the paper's." if paper.notna().any() else ""
    caption = f"{which.capitalize()} accuracy on {table.tested_on} images.{deviation}{hollow}"
    figure = draw_cells(table, values, f"{which} accuracy, %", paper=paper)
    numbers = values.fillna({"std": 0.0}).rename(columns={"count": "runs"}).reset_index()
    return Plot(f"{table.name}-accuracy", caption, figure, _with_coords(table, numbers, ["mean", "std", "runs"]))


def draw_cells(
    table: ResultTable,
    values: pd.DataFrame,
    ylabel: str,
    log: bool = False,
    paper: pd.Series | None = None,
    missing: Sequence[int] = (),
) -> Figure:
    """Plot `mean` and `std` of cells (the index of `values`): x is the table's row, with a line for each column.

    Cells in `missing` are crosses at the upper edge.
    """
    shown = table.cells.loc[sorted({*values.index, *missing, *(paper.dropna().index if paper is not None else ())})]
    rows, columns = list(shown["row"].unique()), list(shown["column"].unique())
    figure, (panel,) = _panels(1, least=0.3 * len(rows))
    for number, column in enumerate(columns):
        style = _series_style(number)
        shift = 0.06 * (number - (len(columns) - 1) / 2)  # so that error bars do not overlap
        cells = shown[shown["column"] == column]
        x = cells["row"].map(rows.index) + shift
        found = values.reindex(cells.index)
        series = column or "runs"
        _draw_column(panel, x, found, cells["baseline"], series, style)
        if paper is not None and paper[cells.index].notna().any():
            known = paper[cells.index].dropna()
            line = {"ls": ":", "lw": 0.8, "ms": 8, "mfc": "none", "label": f"{series}, paper"}
            panel.plot(x[known.index], known, **{**style, **line})
        absent = x[x.index.isin(missing)]
        panel.plot(absent, [0.97] * len(absent), "x", color=style["color"], transform=panel.get_xaxis_transform())
    if missing:
        panel.plot([], [], "x", color="black", label="not reached")
    _row_ticks(figure, panel, table, shown)
    panel.set_ylabel(ylabel)
    if log and not values.empty:
        _log_scale(panel, "y")
    _legend(figure, [panel])
    return figure


def plot_pareto(table: ResultTable) -> Plot:
    """Final accuracy against bytes and syncs, with the Pareto front."""
    figure, panels = _panels(2)
    finished = table.counted[table.counted["finished"]]
    accuracy = 100 * finished.groupby("cell")["final_test_accuracy"].mean()
    numbers = []
    for axis, panel in zip((BYTES, SYNCS), panels, strict=True):
        sent = finished.groupby("cell")[axis.column].mean()
        points = pd.DataFrame({"sent": sent[sent > 0], "accuracy_percent": accuracy}).dropna()
        points = points.join(table.cells[["tick", "column", "baseline"]]).rename_axis("cell").reset_index()
        points["against"] = axis.name
        front = pareto_front(zip(points["sent"], points["accuracy_percent"], strict=True))
        points["on_the_front"] = [xy in front for xy in zip(points["sent"], points["accuracy_percent"], strict=True)]
        _draw_points(panel, table, points)
        if front:
            x, y = zip(*front, strict=True)
            panel.plot(x, y, "k--", lw=0.8, zorder=0, label="front", drawstyle="steps-post")
            panel.margins(0.12)  # room for the labels of the points
            _log_scale(panel, "x")
        panel.set_xlabel(axis.label)
        numbers.append(points)
    panels[0].set_ylabel("final accuracy, %")
    _legend(figure, panels)
    alone = " One worker sends nothing and is left out." if (table.cells["clients"] == 1).any() else ""
    caption = (
        f"Final accuracy on {table.tested_on} images, mean over seeds, against what was sent; the numbers at the "
        f"points: {', '.join(table.row_axes)}.{alone}{_baseline_note(table, BYTES, ' Hollow: ')}."
    )
    columns = ["against", "sent", "accuracy_percent", "on_the_front"]
    return Plot(f"{table.name}-pareto", caption, figure, _with_coords(table, pd.concat(numbers), columns))


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, gain) that no other point dominates, sorted by cost."""
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front


def _ordered(table: ResultTable, points: pd.DataFrame, name: str) -> list[str]:
    """The values of the column `name` of `points`, in the order of the table."""
    return [value for value in table.cells[name].unique() if value in set(points[name])]


def _with_coords(table: ResultTable, points: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The coordinates of each point's cell, a column for each axis of the table, then `columns` of `points`."""
    coords = pd.DataFrame(list(table.cells["coords"]), columns=list(table.axes), dtype=object)
    parts = [coords.loc[points["cell"]], points[columns]]
    return pd.concat([part.reset_index(drop=True) for part in parts], axis="columns")


def _baseline_note(table: ResultTable, axis: XAxis, begin: str = "; dashed: ") -> str:
    """The part of a caption about large-batch baselines, or ""."""
    shown = axis is not EPOCHS and table.cells["baseline"].any()
    return f"{begin}the large batch as data-parallel SGD, its traffic computed" if shown else ""


def _columns_of(panels: int) -> int:
    return max(min(panels, 3), 1)


def _panels(count: int, least: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, at most three side by side, and at least `least` inches wide."""
    from matplotlib.figure import Figure  # takes a second to import

    across = _columns_of(count)
    down = max(-(-count // across), 1)
    figure = Figure(figsize=(max(WIDTHS[across], least), 3.4 * down), layout="constrained")
    panels = list(figure.subplots(down, across, sharey=True, squeeze=False).flatten())
    for panel in panels[count:]:
        panel.remove()
    for panel in panels[:count]:
        panel.grid(alpha=0.3)
    return figure, panels[:count]


def _series_style(number: int) -> dict[str, Any]:
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}


def _line_styles(table: ResultTable, rows: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour from dark to light and a marker for each row; the large-batch baseline is black and dashed."""
    from matplotlib import colormaps

    baselines = set(table.cells["row"][table.cells["baseline"]])
    ordered = [row for row in rows if row not in baselines]
    styles: dict[str, dict[str, Any]] = {row: {"color": "black", "ls": "--", "marker": "x"} for row in baselines}
    for number, row in enumerate(ordered):
        color = colormaps["viridis"](0.8 * number / max(len(ordered) - 1, 1))
        styles[row] = {"color": color, "marker": MARKERS[number % len(MARKERS)]}
    return styles


def _draw_curve(panel: Axes, curve: pd.DataFrame, axis: XAxis, label: str, style: dict[str, Any]) -> None:
    x, mean, deviation = curve[axis.name], 100 * curve["accuracy_mean"], 100 * curve["accuracy_std"]
    panel.plot(x, mean, label=label, lw=1.3, ms=4, markevery=max(len(curve) // 8, 1), **style)
    if deviation.any():
        panel.fill_between(x, mean - deviation, mean + deviation, color=style["color"], alpha=0.15, lw=0)


def _draw_column(
    panel: Axes, x: pd.Series, values: pd.DataFrame, baseline: pd.Series, label: str, style: dict[str, Any]
) -> None:
    """A line through the cells of a column; the large-batch baseline is a hollow marker, not part of the line."""
    for which in (False, True):
        own = values[baseline == which]
        if own["mean"].notna().any():
            shape: dict[str, Any] = {"ls": "", "mfc": "none"} if which else {"ls": "-", "label": label}
            panel.errorbar(x[own.index], own["mean"], own["std"].where(own["std"] > 0), capsize=3, **style, **shape)


def _draw_points(panel: Axes, table: ResultTable, points: pd.DataFrame) -> None:
    """Plot accuracy against traffic, with the coordinates of each cell; large-batch baselines are hollow markers."""
    for number, column in enumerate(_ordered(table, points, "column")):
        style = {**_series_style(number), "ls": ""}
        own = points[points["column"] == column]
        solid, hollow = own[~own["baseline"]], own[own["baseline"]]
        panel.plot(solid["sent"], solid["accuracy_percent"], label=column or "runs", **style)
        panel.plot(hollow["sent"], hollow["accuracy_percent"], mfc="none", **style)
        middle = math.sqrt(points["sent"].min() * points["sent"].max())
        for point in solid.itertuples():
            side, shift = ("right", -4) if point.sent > middle else ("left", 4)
            xy = (point.sent, point.accuracy_percent)
            panel.annotate(point.tick[:LONGEST_LABEL], xy, xytext=(shift, 3), textcoords="offset points", ha=side)


def _row_ticks(figure: Figure, panel: Axes, table: ResultTable, shown: pd.DataFrame) -> None:
    labels = shown.drop_duplicates("row")["tick"]
    panel.set_xticks(range(len(labels)), labels)
    if labels.str.len().sum() > 50:  # they would overlap
        panel.tick_params(axis="x", rotation=90)
        figure.set_figheight(figure.get_figheight() + CHARACTER * labels.str.len().max())
    panel.set_xlabel(", ".join(table.row_axes))


def _log_scale(panel: Axes, which: str) -> None:
    """Make the ``x`` or ``y`` axis logarithmic, in k, M and G, with more ticks on a short range."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    panel.set(**{f"{which}scale": "log"})
    axis = getattr(panel, f"{which}axis")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
    axis.set_major_formatter(EngFormatter(sep=""))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend for all panels, below them."""
    found: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if 0 < len(found) <= MOST_IN_LEGEND:  # more would cover the figure; its CSV has the names
        widths = [0.6 + CHARACTER * len(label) for label in found]  # with the line sample
        room = figure.get_figwidth()
        across = len(found) if sum(widths) < room else max(1, int(room / max(widths)))
        figure.set_figheight(figure.get_figheight() + 0.22 * -(-len(found) // across))
        figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=across, frameon=False)
