"""How much the cells of a table differ in their metric: paired differences over equal seeds, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from fedsim.config import Config, Value
from fedsim.report.result_table import PLAIN, ResultTable, label

# The 97.5 % quantiles of Student's t with 1 to 10 degrees of freedom
QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
NORMAL = 1.959964


def paired_differences(table: ResultTable) -> pd.DataFrame:
    """A line for each cell with a finished run that has a cell to compare it with: the index of both is that of cells.

    Cells are compared that differ in `table.about` alone, each with that of the reference value (see `reference_of`).
    Columns: `group` (the coordinates that they share, as text), `reference` (a cell), `change` (the mean difference of
    the metric over the seeds that both have), `interval` (half of its 95 % confidence interval, NaN for one
    seed), `seeds`, `epoch` at which it is taken (NaN: the last test), and `sent`, bytes over the reference's.
    """
    runs = table.runs[table.runs["finished"] & table.runs[table.metric.final].notna()]
    lines = []
    for group, values in groups(table, runs) if table.about else ():
        reference = reference_of(table.about, values)
        for cell in values.index.drop(reference):
            if line := _difference(table, runs, reference, cell):
                lines.append({"cell": cell, "group": group, "reference": reference, **line})
    columns = ["cell", "group", "reference", "change", "interval", "seeds", "epoch", "sent"]
    return pd.DataFrame(lines, columns=columns).set_index("cell")


def groups(table: ResultTable, runs: pd.DataFrame) -> Iterator[tuple[str, pd.Series]]:
    """The cells of `runs` in groups that differ in `table.about` alone: what they share, and the value of each cell."""
    place = table.axes.index(table.about)
    axes = [axis for axis in table.axes if axis != table.about]
    cells = table.cells.loc[sorted(runs["cell"].unique())]
    others = cells["coords"].map(lambda coords: (*coords[:place], *coords[place + 1 :]))
    for shared, group in cells.groupby(others, sort=False):
        yield label(axes, shared), group["coords"].map(lambda coords: coords[place])


def reference_of(axis: str, values: pd.Series) -> int:
    """The cell (of the index) that the others are compared with: the least number, the default, or the first."""
    numbers = [value for value in values if not isinstance(value, str)]
    usual: Sequence[Value] = [min(numbers)] if numbers else [PLAIN, str(Config().as_keys().get(axis))]
    return int(next((cell for cell, value in values.items() if value in usual), values.index[0]))


def confidence(deviation: float, count: int) -> float:
    """Half of the 95 % confidence interval of a mean of `count` values, by Student's t; NaN for one value."""
    return _quantile(count - 1) * deviation / math.sqrt(count) if count > 1 else float("nan")


def _quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t; beyond the table, the expansion of Abramowitz and Stegun (26.7.5)."""
    if degrees <= len(QUANTILES):
        return QUANTILES[degrees - 1]
    z, n = NORMAL, degrees
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2) + third


def _difference(table: ResultTable, runs: pd.DataFrame, reference: int, cell: int) -> dict[str, float]:
    """How `cell` differs from `reference`; {} if they have no seed in common.

    It is taken at the last tests if both train for the same epochs, else at the end of the shorter run, interpolated
    between tests.
    """
    own = runs[runs["cell"].isin([reference, cell])]
    budgets = table.cells["config"][[reference, cell]].map(lambda config: (config["epochs"], config.get("rounds", 0)))
    same = budgets.nunique() == 1 and not budgets.iloc[0][1]
    epoch = np.inf if same else own["epoch"].min()
    of_both = table.rows[table.rows["run"].isin(own.index)]
    rows = {run: of_run.sort_values("epoch") for run, of_run in of_both.groupby("run")}
    metric = table.metric.column
    columns = [metric, "network_bytes"]
    values = {name: [_at(rows.get(run), epoch, name) for run in own.index] for name in columns}
    by_seed = own.assign(**values).pivot(index="seed", columns="cell", values=columns)
    change = (by_seed[metric][cell] - by_seed[metric][reference]).dropna()
    if change.empty:
        return {}
    sent = by_seed["network_bytes"].mean()
    return {
        "change": change.mean(),
        "interval": confidence(change.std(), len(change)),
        "seeds": len(change),
        "epoch": math.nan if same else epoch,
        "sent": sent[cell] / sent[reference] if sent[reference] > 0 else math.nan,
    }


def _at(rows: pd.DataFrame | None, epoch: float, name: str) -> float:
    """The value of a column at an epoch, interpolated; at inf the last one; NaN if there is none."""
    known = pd.DataFrame() if rows is None else rows.dropna(subset=[name])
    return float(np.interp(epoch, known["epoch"], known[name])) if len(known) else math.nan
