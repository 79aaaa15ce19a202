"""``run.py time-to-accuracy``: estimate from records when each cell would reach a target accuracy on a given network.

The resolution of a time is the interval between two tests: the target was reached between the last test below it and
the first test above it.
"""

from __future__ import annotations

import pandas as pd
from rich.console import Console

from fedsim.errors import UserError
from fedsim.report.figures import Plot, draw_cells
from fedsim.report.network import Network, network_seconds
from fedsim.report.page import folder, output_folder, save_plot, show_path, show_warnings
from fedsim.report.result_table import NOTHING, ResultTable, read_tables
from fedsim.report.tables import COSTS, TRAFFIC, Entry, TextTable, number, percent, rich_table

CAPTION = "within: seconds since the previous test; ±: standard deviation over runs, if larger"
MEANS = ["seconds", "resolution", "epoch", "network_syncs", "network_bytes"]


def time_to_accuracy(
    root: str, target: float, network: Network, compute: float | None, out: str, command: str, console: Console
) -> None:
    """Print the times of every table under `root`, and write them and a figure to `out`. `compute`: in seconds."""
    if not 0 < target < 1:
        raise UserError(f"target = {target} is not an accuracy: give a fraction between 0 and 1, for instance 0.5")
    tables, warnings = read_tables(folder("results", root))
    show_warnings(warnings, console)
    with output_folder(out) as path:
        for table in tables:
            if table.counted.empty:
                continue
            times = times_to_target(table, target, network, compute)
            plot = plot_times(times, table, target)
            save_plot(plot, path, command)
            console.print(rich_table(time_table(times, table, target), CAPTION))
            show_path(path / f"{plot.name}.csv", console)
            show_path(path / f"{plot.name}.png", console)


def times_to_target(table: ResultTable, target: float, network: Network, compute: float | None) -> pd.DataFrame:
    """A line for each tested cell, on the first test at or above `target` of the runs that reach it.

    `compute`: seconds of a worker per local step; None: measured, see `seconds_per_image`. Columns: means of `seconds`,
    `resolution` (seconds since the previous test), `epoch`, `network_syncs`, `network_bytes`; `seconds_std`; `reached`
    and `runs` (numbers of runs); `compute_s`; `best_accuracy` of any run; `finished` (whether all runs are); and the
    columns of the cell.
    """
    tested = table.rows[table.rows["test_accuracy"].notna()].sort_values(["run", "round"])
    cells = table.cells.loc[sorted(tested["cell"].unique())]
    images = images_per_step(cells)
    steps = images * seconds_per_image(table) if compute is None else pd.Series(compute, cells.index)
    tested = tested.assign(seconds=network_seconds(tested, tested["cell"].map(steps), network))
    tested["resolution"] = tested.groupby("run")["seconds"].diff().fillna(tested["seconds"])
    first = tested[tested["test_accuracy"] >= target].dropna(subset=MEANS).groupby("run").head(1)
    by_cell = first.groupby("cell")
    runs = table.runs.groupby("cell")["finished"].agg(runs="size", finished="all")
    found = cells.join([by_cell[MEANS].mean(), by_cell["seconds"].std().rename("seconds_std"), runs])
    reached = by_cell.size().reindex(cells.index, fill_value=0)
    best = tested.groupby("cell")["test_accuracy"].max()
    return found.assign(reached=reached, compute_s=steps, best_accuracy=best)


def seconds_per_image(table: ResultTable) -> float:
    """The median over all runs of the recorded seconds, tests included, per training image computed."""
    workers_images = table.runs["workers"] * table.runs["cell"].map(images_per_step(table.cells))
    seconds = table.runs["seconds"] / (table.runs["local_steps"] * workers_images)
    measured = seconds[(seconds > 0) & (seconds < float("inf"))]
    if measured.empty:
        raise UserError(f"{table.folder} has no recorded seconds: give --compute, for instance 10ms")
    return float(measured.median())


def images_per_step(cells: pd.DataFrame) -> pd.Series:
    """The images of a worker in a step; for a large-batch baseline, its K-th part of the batch."""
    batch = cells["config"].map(lambda config: config["batch-size"])
    return batch / cells["workers"].where(cells["baseline"], 1)


def time_table(times: pd.DataFrame, table: ResultTable, target: float) -> TextTable:
    """The times as a table, the shortest first."""
    shown = ("epoch", *TRAFFIC) if table.with_traffic else ("epoch",)
    rows = []
    for line in times.sort_values("seconds", kind="stable", na_position="last").to_dict("records"):
        reached = Entry(f"{line['reached']} of {line['runs']}")
        name = Entry(line["label"] or table.name)
        if not line["reached"]:
            never = "never" if line["finished"] else "not yet"
            best = Entry(never, f"best {percent(line['best_accuracy'])} %")
            rows.append([name, best, *[Entry(NOTHING)] * (1 + len(shown)), reached])
            continue
        deviation = f" ± {line['seconds_std']:,.1f}" if line["seconds_std"] > line["resolution"] else ""
        rows.append(
            [
                name,
                Entry(f"{number(line['seconds'], 1)}{deviation}"),
                Entry(number(line["resolution"], 1)),
                *(COSTS[cost].entry(line[cost]) for cost in shown),
                reached,
            ]
        )
    title = f"{table.title}: time to {100 * target:g} % accuracy on {table.tested_on} images"
    return TextTable(title, ["cell", "seconds", "within", *(COSTS[cost].title for cost in shown), "runs"], rows)


def plot_times(times: pd.DataFrame, table: ResultTable, target: float) -> Plot:
    """The times by cell; cells that do not reach the target are crosses at the upper edge."""
    found = times[times["reached"] > 0]
    missing = list(times.index[times["reached"] == 0])
    deviation = found["seconds_std"].where(found["seconds_std"] > found["resolution"])
    values = pd.DataFrame({"mean": found["seconds"], "std": deviation})
    figure = draw_cells(table, values, "seconds to the target", log=True, missing=missing)
    crosses = f"; crosses: not reached, {len(missing)} of {len(times)} cells" if missing else ""
    caption = f"Time to {100 * target:g} % accuracy{crosses}."
    numbers = times.rename(columns={"label": "cell", "epoch": "epoch_mean", "seconds": "seconds_mean"})
    numbers = numbers.rename(columns={"network_syncs": "syncs_mean", "network_bytes": "bytes_mean"})
    columns = ["cell", "workers", "compute_s", "runs", "reached", "seconds_mean", "seconds_std", "resolution"]
    columns += ["epoch_mean", "syncs_mean", "bytes_mean", "best_accuracy"]
    return Plot(f"time-to-accuracy-{table.name}", caption, figure, numbers[columns])
