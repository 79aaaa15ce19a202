"""Sentences that answer the main questions about a table of results; the report begins with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from fedsim.report.result_table import ResultTable, label
from fedsim.report.tables import number, percent, statistics

NEAR = 0.95  # of the best final accuracy: the target to which bytes are counted


def answers(table: ResultTable) -> list[str]:
    """A sentence for each question that the finished runs of `table` answer."""
    runs = table.runs[table.runs["finished"] & table.runs["final_test_accuracy"].notna()]
    if runs.empty:
        return ["No run is finished: accuracies are those so far."]
    best = _fewest_bytes(table, runs) if (runs["network_bytes"] > 0).any() else _highest(table, runs)
    return [best, *_gains_of_methods(table, runs), *_costs_of_local_steps(table, runs)]


def seeds_of(count: int) -> str:
    """The number of runs that a mean is over."""
    return "one seed" if count == 1 else f"{count} seeds"


def _highest(table: ResultTable, runs: pd.DataFrame) -> str:
    """The cells with the highest and the lowest final accuracy."""
    final = statistics(runs["final_test_accuracy"], runs["cell"])
    text = f"Highest final accuracy on {table.tested_on} images: {_accuracy(table, final, final['mean'].idxmax())}"
    return f"{text}; lowest: {_accuracy(table, final, final['mean'].idxmin())}." if len(final) > 1 else f"{text}."


def _fewest_bytes(table: ResultTable, runs: pd.DataFrame) -> str:
    """The cell that reaches `NEAR` of the best final accuracy with the fewest bytes, among those that send any."""
    sending = runs[runs["network_bytes"] > 0]
    final = statistics(sending["final_test_accuracy"], sending["cell"])
    best = final["mean"].idxmax()
    target = NEAR * final["mean"][best]
    goal = f"{percent(target)} %, which is {100 * NEAR:g} % of the best final accuracy of cells that send"
    goal += f" ({_accuracy(table, final, best)})"
    rows = table.rows[table.rows["run"].isin(sending.index) & (table.rows["test_accuracy"] >= target)]
    first = rows.dropna(subset=["network_bytes"]).sort_values(["run", "round"]).groupby("run").head(1)
    needed = statistics(first["network_bytes"] / 1e6, first["cell"])
    needed = needed[needed["count"] == final["count"].reindex(needed.index)]
    if needed.empty:
        return f"No cell reaches {goal} in every run."
    least = needed["mean"].idxmin()
    text = f"Fewest bytes to {goal}: {_name(table, least)} with {_megabytes(needed.loc[least])}"
    if least != best and best in needed.index:
        text += f"; {_name(table, best)} needs {_megabytes(needed.loc[best])}"
    return f"{text}."


def _gains_of_methods(table: ResultTable, runs: pd.DataFrame) -> list[str]:
    """What each value of an axis, such as `outer`, gains over ``none`` in cells that are equal otherwise."""
    texts = []
    for axis in table.axes:
        for name, values in _equal_otherwise(table, runs, axis):
            plain = values.index[values == "none"]
            for cell, value in values[values != "none"].items() if len(plain) else ():
                if cost := _cost(table, runs, table.cells.loc[[plain[0], cell]]):
                    texts.append(f"{name}{value} instead of none {cost}.")
    return texts


def _costs_of_local_steps(table: ResultTable, runs: pd.DataFrame) -> list[str]:
    """What the largest J costs compared with the smallest: a sentence for each value of the other axes, such as K."""
    texts = []
    for name, values in _equal_otherwise(table, runs, "local-steps") if "local-steps" in table.axes else ():
        steps = values.astype(int)
        low, high = steps.idxmin(), steps.idxmax()
        if low != high and (cost := _cost(table, runs, table.cells.loc[[low, high]])):
            texts.append(f"{name}J = {steps[high]} instead of J = {steps[low]} {cost}.")
    return texts


def _equal_otherwise(table: ResultTable, runs: pd.DataFrame, axis: str) -> Iterator[tuple[str, pd.Series]]:
    """The cells with runs, in groups that differ in `axis` alone: how a sentence begins, and the value of each cell."""
    place = table.axes.index(axis)
    cells = table.cells.loc[sorted(runs["cell"].unique())].query("not baseline")
    others = cells["coords"].map(lambda coords: (*coords[:place], *coords[place + 1 :]))
    axes = [other for other in table.axes if other != axis]
    for coords, group in cells.groupby(others, sort=False):
        yield f"{label(axes, coords)}: " if axes else "", group["coords"].map(lambda coords: coords[place])


def _cost(table: ResultTable, runs: pd.DataFrame, cells: pd.DataFrame) -> str:
    """The mean difference in accuracy between the second of two cells and the first, over the seeds that both have.

    It is taken at the last tests if both cells train for the same epochs, else at the end of the shorter run,
    interpolated between tests. "" if they have no seed in common.
    """
    low, high = cells.index
    own = runs[runs["cell"].isin(cells.index)]
    budgets = cells["config"].map(lambda config: (config["epochs"], config.get("rounds", 0)))
    same = budgets.nunique() == 1 and not budgets.iloc[0][1]
    epoch = np.inf if same else own["epoch"].min()
    rows = {run: of_run.sort_values("epoch") for run, of_run in table.rows.groupby("run")}
    columns = ("test_accuracy", "network_bytes")
    values = {name: pd.Series([_at(rows.get(run), epoch, name) for run in own.index], own.index) for name in columns}
    by_seed = own.assign(**values).pivot(index="seed", columns="cell", values=list(columns)).dropna()
    if by_seed.empty:
        return ""
    change = by_seed["test_accuracy"][high] - by_seed["test_accuracy"][low]
    text = f"{'costs' if change.mean() < 0 else 'gains'} {percent(abs(change.mean()), change.std())} points"
    text += f" of {table.tested_on} accuracy at {'equal samples' if same else f'epoch {epoch:.1f} of both'}"
    sent = by_seed["network_bytes"].mean()
    fewer = f" and sends {sent[low] / sent[high]:.3g} times fewer bytes" if sent[low] > sent[high] > 0 else ""
    return f"{text}{fewer} ({seeds_of(len(change))})"


def _at(rows: pd.DataFrame | None, epoch: float, name: str) -> float:
    """The value of a column at an epoch, interpolated; at inf the last one; NaN if there is none."""
    known = pd.DataFrame() if rows is None else rows.dropna(subset=[name])
    return float(np.interp(epoch, known["epoch"], known[name])) if len(known) else float("nan")


def _accuracy(table: ResultTable, final: pd.DataFrame, cell: Any) -> str:
    line = final.loc[cell]
    return f"{percent(line['mean'], line['std'])} % at {_name(table, cell)}, {seeds_of(int(line['count']))}"


def _megabytes(line: pd.Series) -> str:
    deviation = f" ± {number(line['std'], 1)}" if line["std"] >= 0.05 else ""  # shown as 0.1 or more
    return f"{number(line['mean'], 1)}{deviation} MB ({seeds_of(int(line['count']))})"


def _name(table: ResultTable, cell: Any) -> str:
    return str(table.cells["label"][cell]) or table.name
