"""The figures of a table of results, each with a caption and its numbers.

Two for each table: the final accuracy against the bytes sent, and accuracy against epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedsim.data.metric import Metric
from fedsim.experiments.study import LARGE_BATCH
from fedsim.report.drawing import (
    CHARACTER,
    MARKERS,
    Plot,
    has_order,
    label_left,
    legend,
    log_scale,
    panels_of,
    row_styles,
    series_style,
)
from fedsim.report.drift import plot_drift
from fedsim.report.labels import name_series
from fedsim.report.result_table import ResultTable
from fedsim.report.spread import plot_spread
from fedsim.report.tables import statistics, summarize

FEWEST = 2  # tests of a curve
BYTES = "bytes sent by all workers, both ways"
LARGE: dict[str, Any] = {"ls": "", "marker": "o", "ms": 12, "mfc": "none"}  # around a point that it may lie on
PAPER: dict[str, Any] = {"ls": "", "ms": 10, "mfc": "none"}


def plots_of(table: ResultTable) -> dict[str, Callable[[], Plot]]:
    """Name -> function that makes it, for every figure that the records allow, in the order of the report."""
    makers: dict[str, Callable[[], Plot]] = {}
    if table.counted["cell"][table.counted["finished"]].nunique() > 1:
        makers[f"{table.name}-{table.metric.name}"] = lambda: plot_metric(table)
    if not mean_curves(table).empty:
        makers[f"{table.name}-epochs"] = lambda: plot_curves(table)
    if table.rows["update_norm"].notna().any():
        makers[f"{table.name}-drift"] = lambda: plot_drift(table)
    if table.lists:
        makers[f"{table.name}-spread"] = lambda: plot_spread(table)
    return makers


def mean_curves(table: ResultTable) -> pd.DataFrame:
    """The mean of the metric over each cell's counted runs, at the rounds in which all of them were tested.

    Columns: `cell`, `epochs`, `METRIC_mean`, `METRIC_std` (0 for one run), `runs`. Cells with one such round have
    no curve.
    """
    metric = table.metric
    tested = table.rows[table.rows[metric.column].notna() & table.rows["run"].isin(table.counted.index)]
    points = tested.groupby(["cell", "round"], as_index=False).agg(
        epochs=("epoch", "mean"),
        **{f"{metric.name}_mean": (metric.column, "mean"), f"{metric.name}_std": (metric.column, "std")},
        runs=("run", "count"),
    )
    points = points[points["runs"] == points["cell"].map(tested.groupby("cell")["run"].nunique())]
    points = points[points.groupby("cell")["round"].transform("size") >= FEWEST]
    return points.drop(columns="round").fillna({f"{metric.name}_std": 0.0})


def plot_curves(table: ResultTable) -> Plot:
    """The metric against epochs: panels for the axis of the table with fewer values, lines for the other."""
    metric = table.metric
    points = mean_curves(table).join(table.cells[["column", "row"]], on="cell")
    few_columns = points["column"].nunique() <= points["row"].nunique()
    panel_of, line_of = ("column", "row") if few_columns else ("row", "column")

    def draw(across: int) -> Figure:
        names, lines = table.ordered(points, panel_of), table.ordered(points, line_of)
        figure, panels = panels_of(len(names), across)
        shown = table.cells[table.cells[line_of].isin(lines)]
        styles = row_styles(shown) if line_of == "row" else {line: series_style(n) for n, line in enumerate(lines)}
        for name, panel in zip(names, panels, strict=True):
            panel.set_title(name, fontsize="medium")
            for line in lines:
                curve = points[(points[panel_of] == name) & (points[line_of] == line)]
                if not curve.empty:
                    _draw_curve(panel, curve, metric, {"label": line or "all runs", **styles[line]})
            panel.set_xlabel("epochs")
        label_left(panels, f"{table.tested_on} {metric.label}")
        legend(figure, panels, lines)
        return figure

    bands = "; bands: one standard deviation over seeds" if (points["runs"] > 1).any() else ""
    unfinished = "; unfinished runs included" if not table.counted["finished"].all() else ""
    numbers = table.with_coords(points, ["epochs", f"{metric.name}_mean", f"{metric.name}_std", "runs"])
    caption = f"{metric.on(table.tested_on)} against epochs{bands}{unfinished}."
    return Plot(f"{table.name}-epochs", caption, draw, numbers)


def plot_metric(table: ResultTable) -> Plot:
    """The final metric of finished runs (or the best, where there are values of the paper) against the bytes sent.

    Where all cells send equally many, it is drawn against the rows of the table.
    """
    points = _points(table)
    with_paper, large = points["paper"].notna().any(), set(points["row"][points["baseline"]])
    against = BYTES if _differ(points["sent"]) else ", ".join(table.row_axes)
    which, metric = "best" if with_paper else "final", table.metric

    def draw(across: int) -> Figure:
        figure, (panel,) = panels_of(1, across)
        if against == BYTES:
            own, rows = points[points["sent"] > 0].assign(x=points["sent"]), table.ordered(points, "row")
        else:
            own, rows = _at_rows(figure, panel, table, points), [""]  # the ticks tell the rows apart
        _draw_points(panel, table, own, [row for row in rows if row not in large])
        if against == BYTES:
            log_scale(panel, "x")
        panel.set(xlabel=against, ylabel=f"{which} {table.tested_on} {metric.label}")
        panel.margins(0.12)  # room for names
        legend(figure, [panel])
        if own["column"].nunique() > 1:
            figure.draw_without_rendering()  # lays it out
            name_series(panel, own, _colors(table, own))
        return figure

    told = [
        "; bars: one standard deviation over seeds" if (points["runs"] > 1).any() else "",
        "; hollow: the paper's" if with_paper else "",
        "; circles: the large batch as data-parallel SGD, its traffic computed" if large and against == BYTES else "",
        "; one worker sends nothing and is left out" if against == BYTES and (points["sent"] == 0).any() else "",
    ]
    what = f"{which.capitalize()} {metric.words} on {table.tested_on} {metric.examples}"
    caption = f"{what} against {against}{''.join(told)}."
    columns = ["sent", "mean", "std", "runs", *(["paper"] if with_paper else [])]
    return Plot(f"{table.name}-{metric.name}", caption, draw, table.with_coords(points, columns))


def _points(table: ResultTable) -> pd.DataFrame:
    """A line for each cell with a finished run: `sent` bytes, `mean`, `std` and `paper` value in its unit, `runs`."""
    paper = table.cells["paper"].map(lambda value: value.best, na_action="ignore").astype(float)
    finished = table.runs[table.runs["finished"]]
    which = "best" if paper.notna().any() else "final"
    tested = table.metric.scale * finished[f"{which}_{table.metric.column}"]
    values = statistics(tested, finished["cell"]).rename(columns={"count": "runs"})
    cells = table.cells[["column", "row", "tick", "baseline"]].assign(paper=paper)
    points = values.fillna({"std": 0.0}).join([cells, summarize(table)["network_bytes"].rename("sent")])
    return points.rename_axis("cell").reset_index()


def _differ(sent: pd.Series) -> bool:
    """Whether the cells that send bytes send different amounts."""
    sending = sent[sent > 0]
    return len(sending) > 1 and sending.max() > 1.1 * sending.min()


def _at_rows(figure: Figure, panel: Axes, table: ResultTable, points: pd.DataFrame) -> pd.DataFrame:
    """`points` with `x` by their rows, the columns side by side; the rows become the ticks of the panel."""
    rows, columns = table.ordered(points, "row"), table.ordered(points, "column")
    shift = points["column"].map(columns.index) - (len(columns) - 1) / 2
    ticks = points.drop_duplicates("row").set_index("row")["tick"][rows]
    panel.set_xticks(range(len(ticks)), ticks)
    if CHARACTER * ticks.str.len().sum() > 0.85 * figure.get_figwidth():  # they would overlap
        panel.tick_params(axis="x", rotation=90)
        figure.set_figheight(figure.get_figheight() + CHARACTER * ticks.str.len().max())
    panel.set_xlim(-0.5, len(rows) - 0.5)
    return points.assign(x=points["row"].map(rows.index) + 0.1 * shift)


def _draw_points(panel: Axes, table: ResultTable, points: pd.DataFrame, rows: Sequence[str]) -> None:
    """Plot `mean` at `x`: a colour for each column and a marker for each of `rows`; numbers, such as J, are joined.

    In a single column, rows that are no numbers have colours too.
    """
    markers: dict[str, dict[str, Any]] = {
        row: {"marker": MARKERS[number % len(MARKERS)], "ms": 6} for number, row in enumerate(rows)
    }
    colors = _colors(table, points)
    if has_order(points):
        for column, own in points[~points["baseline"]].groupby("column"):
            panel.plot(own["x"], own["mean"], lw=1, zorder=1, color=colors[column])
    elif len(colors) == 1:
        for number, marker in enumerate(markers.values()):
            marker["color"] = series_style(number)["color"]
    for point in points.to_dict("records"):
        marker = LARGE if point["baseline"] else markers.get(point["row"], markers[rows[0]])
        style: dict[str, Any] = {"color": colors[point["column"]], **marker}
        panel.errorbar(point["x"], point["mean"], point["std"] or None, capsize=3, lw=1, **style)
        if pd.notna(point["paper"]):
            panel.plot(point["x"], point["paper"], **{**style, **PAPER})
    entries = {row: marker for row, marker in markers.items() if row}
    entries |= {LARGE_BATCH: LARGE} if points["baseline"].any() else {}
    entries |= {"the paper's": {"marker": "o", **PAPER}} if points["paper"].notna().any() else {}
    for name, style in entries.items():
        panel.plot([], [], label=name, **{"color": "0.4", "ls": "", **style})


def _colors(table: ResultTable, points: pd.DataFrame) -> dict[str, str]:
    """The colour of each column of the table that has points."""
    return {name: series_style(number)["color"] for number, name in enumerate(table.ordered(points, "column"))}


def _draw_curve(panel: Axes, curve: pd.DataFrame, metric: Metric, style: dict[str, Any]) -> None:
    x, mean, deviation = curve["epochs"], *(metric.scale * curve[f"{metric.name}_{part}"] for part in ("mean", "std"))
    panel.plot(x, mean, lw=1.3, ms=4, markevery=max(len(curve) // 8, 1), **style)
    if deviation.any():
        panel.fill_between(x, mean - deviation, mean + deviation, color=style["color"], alpha=0.15, lw=0)
