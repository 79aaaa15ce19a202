"""Sentences that answer the question of a table of results, from paired differences over equal seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedsim.data.metric import ACCURACY, Metric
from fedsim.experiments.study import LARGE_BATCH
from fedsim.report.result_table import ResultTable, label
from fedsim.report.tables import statistics

SMALL = 0.005  # half a point of accuracy: values that differ by less are not listed one by one


def answers(table: ResultTable, changes: pd.DataFrame) -> list[str]:
    """The answer in a sentence, then one for each group of cells that are compared, by `paired_differences`."""
    if not table.runs["finished"].any():
        values = "accuracies are" if table.metric == ACCURACY else f"{table.metric.words} is"
        return [f"No run is finished: {values} those so far."]
    if changes.empty:
        return [_highest(table)]
    shown = changes.assign(value=[_value(table, cell) for cell in changes.index])
    spread = shown["change"].clip(lower=0).groupby(shown["group"]).max()
    spread -= shown["change"].clip(upper=0).groupby(shown["group"]).min()
    if spread.max() < SMALL:
        return [_all_alike(table, shown, spread)]
    if table.about == "local-steps":
        return [_of_most_steps(table, shown), *_by_group(table, shown)]
    return [_in_short(table, shown), *_by_group(table, shown)]


def note_of(metric: Metric) -> str:
    """What is said below differences of a metric."""
    unit = f"points of final {metric.words}" if metric.unit == "%" else f"final {metric.words}"
    return (
        f"Differences are paired: over the seeds that both have, in {unit}, ± half of the 95 % confidence interval "
        "(Student's t, not corrected for comparing several). Where it holds 0, the two cannot be told apart."
    )


def _highest(table: ResultTable) -> str:
    """The cells with the best and the worst final value of the metric."""
    finished = table.runs[table.runs["finished"]]
    final = statistics(finished[table.metric.final], finished["cell"])
    if final.empty:
        return "No finished run was tested."
    texts = [f"highest: {_final(table, final, final['mean'].idxmax())}"]
    texts += [f"lowest: {_final(table, final, final['mean'].idxmin())}"] if len(final) > 1 else []
    best_first = "; ".join(texts if table.metric.higher_is_better else texts[::-1])
    return f"{best_first[0].upper()}{best_first[1:]}."


def _all_alike(table: ResultTable, changes: pd.DataFrame, spread: pd.Series) -> str:
    """For instance: the 4 values of outer differ by at most 0.15 points at equal local-steps."""
    values = 1 + changes["value"].nunique()
    others = " and ".join(axis for axis in table.axes if axis != table.about)
    where = f" at equal {others}" if others else ""
    text = f"The {values} values of {table.about} differ by at most {_most(table, spread)}{where}"
    if len(changes) == 1 and not changes["interval"].isna().any():
        text += f": {_and_interval(table, changes.iloc[0])}, they cannot be told apart"
    return f"{text} ({_seeds(changes)})."


def _of_most_steps(table: ResultTable, changes: pd.DataFrame) -> str:
    """What the largest J costs in each group."""
    steps = changes[changes["value"] != LARGE_BATCH]
    last = steps.groupby("group", sort=False).tail(1)
    reference = last["reference"].map(lambda cell: _value(table, cell))
    parts = []
    for (value, other), lines in last.groupby([last["value"], reference], sort=False):
        costs = [
            f"{_and_interval(table, line)} {table.metric.points}{_at(line['group'])}{_sent(line)}"
            for line in lines.to_dict("records")
        ]
        parts.append(f"{value} instead of {other}: {', '.join(costs)}")
    return f"{'; '.join(parts)} ({_seeds(changes)})."


def _in_short(table: ResultTable, changes: pd.DataFrame) -> str:
    """The values that are above the reference, below it, or cannot be told apart from it, and in which groups."""
    metric = table.metric
    if changes["interval"].isna().all():
        best, worst = changes["change"].idxmax(), changes["change"].idxmin()
        named = ", ".join(
            f"{changes['value'][cell]} {metric.difference(changes['change'][cell])} {metric.points}"
            f"{_at(changes['group'][cell])}"
            for cell in dict.fromkeys([best, worst])
        )
        return f"Against {_reference(table, changes)}: {named} ({_seeds(changes)}, so no interval)."
    above, apart = changes["change"] > 0, changes["change"].abs() > changes["interval"]
    parts = {"above": changes[apart & above], "below": changes[apart & ~above], "not told apart": changes[~apart]}
    told = []
    for how, found in parts.items():
        by_value = found.groupby("value", sort=False)["group"].agg(list)
        names = [f"{value}{_where(where, changes)}" for value, where in by_value.items()]
        told += [f"{how}: {', '.join(names)}"] if names else []
    return f"Against {_reference(table, changes)}, {'; '.join(told)} ({_seeds(changes)})."


def _by_group(table: ResultTable, changes: pd.DataFrame) -> list[str]:
    """A sentence for each group: every value with its difference to the reference and the bytes that it sends."""
    texts = []
    for group, lines in changes.groupby("group", sort=False):
        ascending = not table.metric.higher_is_better  # the best first
        by_change = lines.sort_values("change", ascending=ascending, kind="stable")
        order = lines if table.about == "local-steps" else by_change
        listed = [f"{line['value']} {_and_interval(table, line)}{_sent(line)}" for line in order.to_dict("records")]
        epochs = order["epoch"].dropna()
        at = f" at epoch {epochs.min():.1f}" if len(epochs) else ""
        where = f"{group}, against" if group else "Against"
        texts.append(f"{where} {_value(table, lines['reference'].iloc[0])}{at}: {', '.join(listed)}.")
    return texts


def _at(group: str) -> str:
    return f" at {group}" if group else ""


def _where(found: Sequence[str], changes: pd.DataFrame) -> str:
    """The groups in which a value was found, unless these are all."""
    return "" if len(found) == changes["group"].nunique() else f" ({', '.join(found)})"


def _and_interval(table: ResultTable, line: Any) -> str:
    return table.metric.difference(line["change"], line["interval"])


def _most(table: ResultTable, spread: pd.Series) -> str:
    return f"{table.metric.number(spread.max())} {table.metric.points}"


def _sent(line: Any) -> str:
    """The bytes against those of the reference, where they differ by a tenth or more."""
    ratio = line["sent"]
    if not 0 < ratio < np.inf or 0.9 < ratio < 1.1:
        return ""
    return f" ({1 / ratio:.2g} times fewer bytes)" if ratio < 1 else f" ({ratio:.2g} times the bytes)"


def _value(table: ResultTable, cell: Any) -> str:
    """The value that a cell has of the axis that is compared."""
    place = table.axes.index(table.about)
    return label(table.axes[place : place + 1], table.cells["coords"][cell][place : place + 1])


def _reference(table: ResultTable, changes: pd.DataFrame) -> str:
    return " or ".join(dict.fromkeys(_value(table, cell) for cell in changes["reference"]))


def _seeds(changes: pd.DataFrame) -> str:
    counts = sorted({int(count) for count in changes["seeds"]})
    return "one seed" if counts == [1] else f"{' or '.join(map(str, counts))} seeds"


def _final(table: ResultTable, final: pd.DataFrame, cell: Any) -> str:
    line = final.loc[cell]
    return f"{table.metric.with_unit(table.metric.number(line['mean'], line['std']))} at {_name(table, cell)}"


def _name(table: ResultTable, cell: Any) -> str:
    return str(table.cells["label"][cell]) or table.name
