"""The figure of what was tested of each class or client: how many of them are how good."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fedsim.report.drawing import Plot, draw_cells
from fedsim.report.result_table import ResultTable
from fedsim.runs.columns import OF_CLIENTS, OF_OWN_MODELS

CLIENTS = {OF_CLIENTS: "clients, global model", OF_OWN_MODELS: "clients, their own models"}
PERCENT = list(range(0, 101, 10))


def quantiles(table: ResultTable) -> pd.DataFrame:
    """The quantiles of each list of the last test, means over each cell's counted runs: `cell`, `percent`, the values.

    Classes and clients without a value are left out.
    """
    runs = table.counted
    points = []
    for name in table.lists:
        for cell, values in runs[name].dropna().groupby(runs["cell"]):
            known = [[value for value in of_run if value is not None] for of_run in values]
            of_runs = [np.percentile(of_run, PERCENT) for of_run in known if of_run]
            points += [
                {"cell": cell, "percent": percent, "of": name, "value": value}
                for percent, value in zip(PERCENT, np.mean(of_runs, axis=0) if of_runs else [], strict=False)
            ]
    frame = pd.DataFrame(points).pivot(index=["cell", "percent"], columns="of", values="value")
    return frame.reindex(columns=table.lists).reset_index()


def plot_spread(table: ResultTable) -> Plot:
    """The quantiles: a panel for each list, a line for each cell."""
    points = quantiles(table)
    titles = {name: CLIENTS.get(name.removeprefix("final_"), name.removeprefix("final_test_")) for name in table.lists}
    titles = {name: title.replace("_", " ") for name, title in titles.items()}

    def draw(across: int) -> Figure:
        return draw_cells(table.cells, points, titles, "percent", across)

    caption = (
        "The last test of each class or client, sorted: that of the lowest stands at 0 %, of the median at 50 %, of "
        "the highest at 100 %, mean over seeds. Clients are tested on their shares of the test data: the global model, "
        f"and that of each client after its local steps. Clients' values: {table.metric.words}."
    )
    return Plot(f"{table.name}-spread", caption, draw, table.with_coords(points, ["percent", *table.lists]))
