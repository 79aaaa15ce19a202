"""The figures of a table of results, each with a caption and its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedsim.report.drawing import (
    CHARACTER,
    Plot,
    label_left,
    legend,
    log_scale,
    panels_of,
    row_styles,
    series_style,
)
from fedsim.report.drift import plot_drift
from fedsim.report.result_table import ResultTable
from fedsim.report.tables import statistics, summarize

LONGEST_LABEL = 14  # characters beside a point
LABEL_PLACES = ((4, 3), (4, -12), (8, -4))  # of three series in turn, from the point, so that labels do not collide


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
    if (finished["network_bytes"] > 0).any():
        makers[f"{table.name}-pareto"] = lambda: plot_pareto(table)
    if table.rows["test_accuracy"].notna().any():
        makers[f"{table.name}-epochs"] = lambda: plot_curves(table, EPOCHS)
        if table.with_traffic:
            makers[f"{table.name}-syncs"] = lambda: plot_curves(table, SYNCS)
            makers[f"{table.name}-bytes"] = lambda: plot_curves(table, BYTES)
    if table.rows["update_norm"].notna().any():
        makers[f"{table.name}-drift"] = lambda: plot_drift(table)
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

    def draw(across: int) -> Figure:
        columns, rows = table.ordered(points, "column"), table.ordered(points, "row")
        figure, panels = panels_of(len(columns), across)
        styles = row_styles(table.cells[table.cells["row"].isin(points["row"])])
        for column, panel in zip(columns, panels, strict=True):
            panel.set_title(column, fontsize="medium")
            for row in rows:
                curve = points[(points["column"] == column) & (points["row"] == row)]
                if not curve.empty:
                    _draw_curve(panel, curve, axis, row or "all runs", styles[row])
            panel.set_xlabel(axis.label)
            if axis is not EPOCHS:
                log_scale(panel, "x")
        label_left(panels, f"{table.tested_on} accuracy, %")
        legend(figure, panels, rows)
        return figure

    bands = "; bands: one standard deviation over seeds" if (points["runs"] > 1).any() else ""
    unfinished = "; unfinished runs included" if not table.counted["finished"].all() else ""
    notes = f"{bands}{unfinished}{_baseline_note(table, axis)}"
    caption = f"Accuracy on {table.tested_on} images against {axis.label}{notes}."
    numbers = _with_coords(table, points, [axis.name, "accuracy_mean", "accuracy_std", "runs"])
    return Plot(f"{table.name}-{axis.name}", caption, draw, numbers)


def plot_accuracy(table: ResultTable) -> Plot:
    """Accuracy of finished runs by cell: the final one, or the best where there are values of the paper to compare."""
    paper = table.cells["paper"].map(lambda value: value.best, na_action="ignore").astype(float)
    which = "best" if paper.notna().any() else "final"
    finished = table.runs[table.runs["finished"]]
    values = statistics(100 * finished[f"{which}_test_accuracy"], finished["cell"])
    deviation = " Bars: one standard deviation over seeds." if (values["count"] > 1).any() else ""
    hollow = " Hollow: the paper's." if paper.notna().any() else ""
    caption = f"{which.capitalize()} accuracy on {table.tested_on} images.{deviation}{hollow}"
    numbers = values.fillna({"std": 0.0}).rename(columns={"count": "runs"}).reset_index()
    numbers = _with_coords(table, numbers, ["mean", "std", "runs"])
    return Plot(
        f"{table.name}-accuracy",
        caption,
        lambda across: _draw_cells(table, values, paper, f"{which} accuracy, %", across),
        numbers,
    )


def _draw_cells(table: ResultTable, values: pd.DataFrame, paper: pd.Series, ylabel: str, across: int) -> Figure:
    """Draw `mean` and `std` of cells (the index of `values`) and the paper's values: rows along x, a line a column."""
    shown = table.cells.loc[sorted({*values.index, *paper.dropna().index})]
    rows, columns = table.ordered(shown, "row"), table.ordered(shown, "column")
    figure, (panel,) = panels_of(1, across, width=0.3 * len(rows))
    for number, column in enumerate(columns):
        style = series_style(number)
        shift = 0.06 * (number - (len(columns) - 1) / 2)  # so that error bars do not overlap
        cells = shown[shown["column"] == column]
        points = values.reindex(cells.index).assign(x=cells["row"].map(rows.index) + shift, baseline=cells["baseline"])
        series = column or "runs"
        _draw_series(panel, points, series, {**style, "ls": "-"})
        known = paper[cells.index].dropna()
        if not known.empty:
            line = {"ls": ":", "lw": 0.8, "ms": 8, "mfc": "none", "label": f"{series}, paper"}
            panel.plot(points["x"][known.index], known, **{**style, **line})
    _row_ticks(figure, panel, table, shown)
    panel.set_ylabel(ylabel)
    legend(figure, [panel])
    return figure


def plot_pareto(table: ResultTable) -> Plot:
    """Final accuracy against bytes and syncs, with the Pareto front."""
    finished = table.counted[table.counted["finished"]]
    cells = summarize(table).loc[sorted(finished["cell"].unique())].rename_axis("cell").reset_index()
    cells = cells.assign(accuracy_percent=100 * cells["final"], std=100 * cells["final_std"])
    parts = {}
    for axis in (BYTES, SYNCS):
        points = cells[cells[axis.column] > 0].rename(columns={axis.column: "sent"}).assign(against=axis.name)
        parts[axis] = points.assign(on_the_front=pareto_front(points["sent"], points["accuracy_percent"]))

    def draw(across: int) -> Figure:
        figure, panels = panels_of(2, across)
        for (axis, points), panel in zip(parts.items(), panels, strict=True):
            _draw_points(panel, table, points)
            front = points[points["on_the_front"]].sort_values("sent")
            if not front.empty:
                panel.step(
                    front["sent"], front["accuracy_percent"], "k--", where="post", lw=0.8, zorder=0, label="front"
                )
                panel.margins(0.12)  # room for the labels of the points
                log_scale(panel, "x")
            panel.set_xlabel(axis.label)
        label_left(panels, "final accuracy, %")
        legend(figure, panels)
        return figure

    alone = " One worker sends nothing and is left out." if (table.cells["clients"] == 1).any() else ""
    hollow = f"{_baseline_note(table, BYTES, ' Hollow: ')}." if table.cells["baseline"].any() else ""
    bars = "; bars: one standard deviation" if cells["std"].notna().any() else ""
    caption = (
        f"Final accuracy on {table.tested_on} images, mean over seeds{bars}, against what was sent; the numbers at the "
        f"points: {', '.join(table.row_axes)}.{alone}{hollow}"
    )
    columns = ["against", "sent", "accuracy_percent", "on_the_front"]
    return Plot(f"{table.name}-pareto", caption, draw, _with_coords(table, pd.concat(parts.values()), columns))


def pareto_front(cost: pd.Series, gain: pd.Series) -> pd.Series:
    """Whether each point is on the Pareto front: no other point costs at most as much and gains at least as much."""
    best = gain.groupby(cost).max()
    best_for_less = best.cummax().shift().fillna(-math.inf)
    return (gain == cost.map(best)) & (gain > cost.map(best_for_less))


def _with_coords(table: ResultTable, points: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The coordinates of each point's cell, a column for each axis of the table, then `columns` of `points`."""
    coords = pd.DataFrame(list(table.cells["coords"]), columns=list(table.axes), dtype=object)
    parts = [coords.loc[points["cell"]], points[columns]]
    return pd.concat([part.reset_index(drop=True) for part in parts], axis="columns")


def _baseline_note(table: ResultTable, axis: XAxis, begin: str = "; dashed: ") -> str:
    """The part of a caption about large-batch baselines, or ""."""
    shown = axis is not EPOCHS and table.cells["baseline"].any()
    return f"{begin}the large batch as data-parallel SGD, its traffic computed" if shown else ""


def _draw_curve(panel: Axes, curve: pd.DataFrame, axis: XAxis, label: str, style: dict[str, Any]) -> None:
    x, mean, deviation = curve[axis.name], 100 * curve["accuracy_mean"], 100 * curve["accuracy_std"]
    panel.plot(x, mean, label=label, lw=1.3, ms=4, markevery=max(len(curve) // 8, 1), **style)
    if deviation.any():
        panel.fill_between(x, mean - deviation, mean + deviation, color=style["color"], alpha=0.15, lw=0)


def _draw_series(panel: Axes, points: pd.DataFrame, label: str, style: dict[str, Any]) -> None:
    """Draw `mean` and `std` at `x`; the large-batch baseline is a hollow marker, without a line."""
    for baseline, own in points.dropna(subset=["mean"]).groupby("baseline"):
        shape: dict[str, Any] = {"ls": "", "mfc": "none"} if baseline else {"label": label}
        panel.errorbar(own["x"], own["mean"], own["std"].where(own["std"] > 0), **{"capsize": 3, **style, **shape})


def _draw_points(panel: Axes, table: ResultTable, points: pd.DataFrame) -> None:
    """Plot accuracy against traffic; the text at a point is the cell's row."""
    middle = math.sqrt(points["sent"].min() * points["sent"].max()) if len(points) else 0.0
    one_place = points["sent"].nunique() == 1
    for number, column in enumerate(table.ordered(points, "column")):
        own, style = points[points["column"] == column], series_style(number)
        series = own.rename(columns={"sent": "x", "accuracy_percent": "mean"})
        _draw_series(panel, series, column or "runs", {**style, "ls": ""})
        right, up = LABEL_PLACES[number % len(LABEL_PLACES)]
        for point in own[~own["baseline"]].itertuples():
            at_left = number % 2 == 1 if one_place else point.sent > middle
            panel.annotate(
                point.tick[:LONGEST_LABEL],
                (point.sent, point.accuracy_percent),
                xytext=(-right if at_left else right, up),
                textcoords="offset points",
                ha="right" if at_left else "left",
                color=style["color"],
            )


def _row_ticks(figure: Figure, panel: Axes, table: ResultTable, shown: pd.DataFrame) -> None:
    labels = shown.drop_duplicates("row").set_index("row")["tick"][table.ordered(shown, "row")]
    panel.set_xticks(range(len(labels)), labels)
    if CHARACTER * labels.str.len().sum() > 0.85 * figure.get_figwidth():  # they would overlap
        panel.tick_params(axis="x", rotation=90)
        figure.set_figheight(figure.get_figheight() + CHARACTER * labels.str.len().max())
    panel.set_xlabel(", ".join(table.row_axes))
