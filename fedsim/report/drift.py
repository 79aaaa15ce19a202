"""The figure of the drift of clients: how far, and how alike, they move in a round (see `strategies.drift`)."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from fedsim.report.drawing import Plot, draw_cells
from fedsim.report.result_table import ResultTable

TITLES = {
    "update_norm": "norm of the mean update",
    "update_cosine": "mean cosine of two updates",
    "update_spread": "spread of their norms",
    "consensus_distance": "distance of the models to their mean",
}


def drift_curves(table: ResultTable) -> pd.DataFrame:
    """The means over each cell's counted runs, at the rounds that all of them recorded: `cell`, `epochs`, the values.

    A value is missing where any of these runs has none.
    """
    rows = table.rows[table.rows["update_norm"].notna() & table.rows["run"].isin(table.counted.index)]
    by_round = rows.groupby(["cell", "round"])
    points = by_round[["epoch", *TITLES]].mean().where(by_round[["epoch", *TITLES]].count().eq(by_round.size(), axis=0))
    points = points.assign(runs=by_round.size()).reset_index()
    all_runs = points["cell"].map(rows.groupby("cell")["run"].nunique())
    return points[points["runs"] == all_runs].rename(columns={"epoch": "epochs"})


def plot_drift(table: ResultTable) -> Plot:
    """Drift against epochs: a panel for each of its measures, a line for each cell."""
    points = drift_curves(table)
    shown = {name: title for name, title in TITLES.items() if points[name].notna().any()}

    def draw(across: int) -> Figure:
        return draw_cells(table.cells, points, shown, "epochs", across)

    caption = (
        "Drift of the clients against epochs, in the rounds in which the model was tested, mean over seeds: the norm "
        "of x minus the mean of their models; the mean cosine of the updates of two of them, 1 where all move in one "
        "direction; the standard deviation of the norms of their updates, divided by the mean of these; and, where "
        "clients have models of their own, the root mean square of the distances of these to their mean."
    )
    numbers = table.with_coords(points, ["epochs", *shown, "runs"])
    return Plot(f"{table.name}-drift", caption, draw, numbers)
