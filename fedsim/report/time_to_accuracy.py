"""``run.py time-to-accuracy``: estimate from records when each cell would reach a target accuracy on a given network.

The resolution of a time is the interval between two tests: the target was reached between the last test below it and
the first test above it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from rich.console import Console

from fedsim.config.options import TimeOptions
from fedsim.data.metric import ACCURACY, Metric
from fedsim.errors import UserError
from fedsim.network import Network, duration, rate
from fedsim.report.bandwidths import goal_of, plot_bandwidths
from fedsim.report.load import escaped
from fedsim.report.network import network_seconds
from fedsim.report.page import folder, output_folder, save_plot, show_path, show_warnings, write_csv
from fedsim.report.result_table import NOTHING, ResultTable, read_tables, split_by
from fedsim.report.stragglers import Stragglers, computed_steps, stragglers
from fedsim.report.tables import Entry, TextTable, number, show_table

PARTS = ["computing", "waiting", "transfer"]  # of the seconds of a run
CIRCUMSTANCES = ("dataset", "partition")  # between which nobody chooses: the fastest cell is that of each
MEANS = ["seconds", *PARTS, "resolution", "epoch", "network_syncs", "sent_up", "sent_down"]
CAPTION = "within: seconds since the previous test; ±: standard deviation over runs, if larger; MB: of all workers"


class Plan(NamedTuple):
    """What the estimate is for: the accuracy to reach, the network, the seconds of a usual local step, and the workers.

    `compute` None: measured, see `seconds_per_image`.
    """

    target: float
    network: Network
    compute: float | None = None
    stragglers: Stragglers = Stragglers()


def plan_of(options: TimeOptions) -> Plan:
    """The plan that the options ask for; raises UserError."""
    upload = rate("upload", options.upload) if options.upload else 0.0
    latency = duration("latency", options.latency, zero=True)
    network = Network(rate("bandwidth", options.bandwidth), latency, options.link, upload)
    step = duration("compute", options.compute) if options.compute else None
    return Plan(options.target, network, step, stragglers(options.jitter, options.slow))


def time_to_accuracy(root: str, plan: Plan, out: str, command: str, console: Console) -> None:
    """Print the times of every table under `root`, and write them and a figure to `out`."""
    whole, warnings = read_tables(folder("results", root))
    if len(metrics := {table.metric for table in whole}) > 1:
        names = " and ".join(sorted(metric.words for metric in metrics))
        raise UserError(f"{escaped(root)} has runs compared by {names}, of which a target is one: give a folder of one")
    if any(table.metric.unit == "%" for table in whole) and not 0 < plan.target < 1:
        raise UserError(f"target = {plan.target} is not an accuracy: give a fraction between 0 and 1, for instance 0.5")
    tables = [part for table in whole for part in split_by(table, CIRCUMSTANCES)]
    found = [(table, times_to_target(table, plan)) for table in tables if not table.counted.empty]
    show_warnings(warnings, console)
    with output_folder(out) as path:
        for table, times in found:
            plot = plot_bandwidths(times, table, plan.target, plan.network)
            files = save_plot(plot, path, command)
            times_file = path / f"time-to-accuracy-{table.name}.csv"
            write_csv(times_frame(times, table.metric), times_file)
            show_table(time_table(times, table, plan), console, CAPTION)
            console.print(escaped(plot.caption), markup=False, highlight=False)
            for file in (times_file, *files):
                show_path(file, console)


def times_to_target(table: ResultTable, plan: Plan) -> pd.DataFrame:
    """A line for each tested cell, over the runs that reach the target, at the first test of each that does.

    Columns: means of `seconds`, of the parts `computing`, `waiting` for latency and `transfer`, `resolution` (seconds
    since the previous test), `epoch`, `network_syncs`, and the bytes of all workers `sent_up`, `sent_down`;
    `seconds_std`; `reached` and `runs` (numbers of runs); `compute_s` (of
    a step); `best_METRIC` of any run; `finished` (whether all runs are); `late` (whether messages are on their way
    while workers compute); and the columns of the cell.
    """
    rows = table.rows.sort_values(["run", "round"])
    metric = table.metric
    cells = table.cells.loc[sorted(rows["cell"][rows[metric.column].notna()].unique())]
    _check_link(cells, plan.network)
    cells = cells.assign(late=cells["config"].map(lambda config: "delay" in str(config.get("layer")).split("+")))
    images = images_per_step(cells)
    steps = images * seconds_per_image(table) if plan.compute is None else pd.Series(plan.compute, cells.index)
    rows = rows.assign(
        computing=computed_steps(rows, plan.stragglers) * rows["cell"].map(steps),
        **network_seconds(rows, plan.network),
    )
    rows = rows.assign(seconds=_seconds(rows, rows["cell"].map(cells["late"])))
    tested = rows[rows[metric.column].notna()]
    tested = tested.assign(resolution=tested.groupby("run")["seconds"].diff().fillna(tested["seconds"]))
    first = tested[metric.reaches(tested[metric.column], plan.target)].dropna(subset=MEANS).groupby("run").head(1)
    by_cell = first.groupby("cell")
    runs = table.runs.groupby("cell")["finished"].agg(runs="size", finished="all")
    found = cells.join([by_cell[MEANS].mean(), by_cell["seconds"].std().rename("seconds_std"), runs])
    reached = by_cell.size().reindex(cells.index, fill_value=0)
    best = tested.groupby("cell")[metric.column].agg("max" if metric.higher_is_better else "min")
    return found.assign(reached=reached, compute_s=steps, **{f"best_{metric.name}": best})


def _seconds(rows: pd.DataFrame, late: pd.Series) -> pd.Series:
    """The seconds of a run up to each of its `rows`.

    They are the sum of `PARTS` or, where `late`, the longer of computing and messages in each round. The rounds between
    two rows count as equal.
    """
    since = rows.groupby("run")[PARTS].diff().fillna(rows[PARTS])
    longer = np.maximum(since["computing"], since["waiting"] + since["transfer"])
    return rows[PARTS].sum(axis="columns", skipna=False).where(~late, longer.groupby(rows["run"]).cumsum())


def seconds_per_image(table: ResultTable) -> float:
    """The median over all runs of the recorded seconds, tests included, per training image computed."""
    workers_images = table.runs["workers"] * table.runs["cell"].map(images_per_step(table.cells))
    seconds = table.runs["seconds"] / (table.runs["steps_done"] * workers_images)
    measured = seconds[(seconds > 0) & (seconds < float("inf"))]
    if measured.empty:
        raise UserError(f"{table.title}: no run has recorded seconds: give --compute, for instance 10ms")
    return float(measured.median())


def images_per_step(cells: pd.DataFrame) -> pd.Series:
    """The images of a worker in a step; for a large-batch baseline, its K-th part of the batch."""
    batch = cells["config"].map(lambda config: config["batch-size"])
    return batch / cells["workers"].where(cells["baseline"], 1)


def time_table(times: pd.DataFrame, table: ResultTable, plan: Plan) -> TextTable:
    """The times as a table, the shortest first."""
    shown = {"network_syncs": ("syncs", 1.0), "sent_up": ("MB up", 1e6), "sent_down": ("MB down", 1e6)}
    columns = shown if table.with_traffic else {}
    rows = []
    for line in times.sort_values("seconds", kind="stable", na_position="last").to_dict("records"):
        reached = Entry(f"{line['reached']} of {line['runs']}")
        name = Entry(line["label"] or table.name)
        if not line["reached"]:
            never = "never" if line["finished"] else "not yet"
            value = table.metric.number(line[f"best_{table.metric.name}"])
            best = Entry(never, f"best {table.metric.with_unit(value)}")
            rows.append([name, best, *[Entry(NOTHING)] * (1 + len(columns)), reached])
            continue
        deviation = f" ± {number(line['seconds_std'])}" if line["seconds_std"] > line["resolution"] else ""
        costs = [Entry(number(line[column] / unit)) for column, (_, unit) in columns.items()]
        times_of = (Entry(f"{number(line['seconds'])}{deviation}"), Entry(number(line["resolution"])))
        rows.append([name, *times_of, *costs, reached])
    title = f"{table.title}: time to {goal_of(table, plan.target)}"
    header = ["cell", "seconds", "within", *(title for title, _ in columns.values()), "runs"]
    return TextTable(title, header, rows)


def times_frame(times: pd.DataFrame, metric: Metric = ACCURACY) -> pd.DataFrame:
    """The times as a table of numbers."""
    means = {name: f"{name.removeprefix('network_')}_mean" for name in MEANS if name != "resolution"}
    numbers = times.drop(columns="label").assign(cell=times["label"]).rename(columns=means)
    columns = ["cell", "workers", "compute_s", "runs", "reached", "seconds_mean", "seconds_std", "resolution"]
    return numbers[[*columns, *(name for name in means.values() if name not in columns), f"best_{metric.name}"]]


def _check_link(cells: pd.DataFrame, network: Network) -> None:
    sampled = cells[cells["workers"] < cells["clients"]]
    if network.link == "all-reduce" and not sampled.empty:
        cell: Any = sampled.iloc[0]
        raise UserError(
            f"link = all-reduce: {cell['label'] or 'the run'} samples {cell['workers']} of {cell['clients']} clients "
            "in a round, which get the model from a server: give --link worker or server"
        )
    for cell in cells.to_dict("records") if network.link == "all-reduce" else ():
        if (topology := cell["config"].get("topology", "all")) != "all":
            raise UserError(
                f"link = all-reduce: the clients of {cell['label'] or 'the run'} do not average over all (topology = "
                f"{topology}): give --link worker or server"
            )
