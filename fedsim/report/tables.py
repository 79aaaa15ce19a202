"""Text tables of a `ResultTable`: accuracies, costs, notes and origins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedsim.config import ARGUMENTS
from fedsim.data.metric import ACCURACY, Metric
from fedsim.report.result_table import NOTHING, ResultTable
from fedsim.report.tuning import tuning_notes
from fedsim.runs.columns import OF_CLIENTS

CSV_COLUMNS = (
    "run", "mode", "optimizer", "clients", "local_steps_per_round", "batch_size", "seed", "tested_on", "finished",
    "final_test_accuracy", "best_test_accuracy", "last_test_accuracy", "epoch", "round", "steps_done", "syncs",
    "bytes_up", "bytes_down", "overhead_bytes_up", "overhead_bytes_down", "peak_bytes_up",
    "peak_bytes_down", "updates_left_out", "seconds", "device", "commit",
)  # fmt: skip


class Entry(NamedTuple):
    """One field of a table: its text, and a note in small print."""

    text: str
    note: str = ""


class TextTable(NamedTuple):
    """A table of text, for the page and the terminal."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Entry]]


COSTS = {  # column: (title, unit)
    "epoch": ("epochs", 1),
    "network_syncs": ("syncs", 1),
    "network_bytes": ("MB sent", 1e6),
    "network_peak": ("MB peak", 1e6),
    "seconds": ("minutes", 60),
}
# Columns that a narrow terminal leaves out, the least important first; before these, others that are not always shown
ALWAYS_SHOWN = ("cell", "state", "seconds", "final", "MB sent", "MB up")
LEFT_OUT_FIRST = (
    *("MB peak", "syncs", "within", "device", "host", "date", "runs", "MB down", "minutes", "the paper's best"),
    *("best", "difference"),
)
TRAFFIC = ("network_syncs", "network_bytes", "network_peak")
WORST_CLIENT = f"final_{OF_CLIENTS}_worst"


def summarize(table: ResultTable) -> pd.DataFrame:
    """A line for each tested cell, over its `counted` runs.

    `best`, `final` (means of the metric), `best_std`, `final_std` (NaN for one run), the means of `other_tests` and
    `COSTS`, `left_out` (the sum of updates left out), `finished` and `started` (numbers of runs), `reached` (the last
    epoch of unfinished runs), and the columns of the cell.
    """
    by_cell = table.counted.groupby("cell")
    tests = by_cell.agg(
        best=(table.metric.best, "mean"),
        best_std=(table.metric.best, "std"),
        final=(table.metric.final, "mean"),
        final_std=(table.metric.final, "std"),
        left_out=("updates_left_out", "sum"),
    )
    every = table.runs.groupby("cell")
    runs = every.agg(finished=("finished", "sum"), started=("finished", "size"))
    unfinished = table.runs[~table.runs["finished"]]
    runs["reached"] = unfinished.groupby("cell")["epoch"].max()
    others = table.counted[table.other_tests].astype(float).groupby(table.counted["cell"]).mean()
    return table.cells.join([tests, others, by_cell[list(COSTS)].mean(), runs], how="inner").sort_index()


def result_table(table: ResultTable, changes: pd.DataFrame, costs: Sequence[str] = tuple(COSTS)) -> TextTable:
    """A line for each tested cell: runs, the metric with the paper's, other tests, `paired_differences`, mean costs.

    Of clients it has the worst one alone.
    """
    summary = summarize(table).join(changes[["change", "interval"]])
    costs = [name for name in costs if name not in TRAFFIC or (table.with_traffic and summary[name].notna().all())]
    others = [name for name in table.other_tests if name == WORST_CLIENT or OF_CLIENTS not in name]
    with_paper, compared = summary["paper"].notna().any(), not changes.empty
    rows, metric = [], table.metric
    for line in summary.to_dict("records"):
        best = [Entry(metric.number(line["best"], line["best_std"])), _of_paper(line)] if with_paper else []
        change = [Entry(metric.difference(line["change"], line["interval"]))] if compared else []
        numbers = [Entry(number(line[name] / COSTS[name][1])) for name in costs]
        name, final = Entry(line["label"] or table.name), Entry(metric.number(line["final"], line["final_std"]))
        tests = [Entry(_other_test(metric, name, line[name])) for name in others]
        rows.append([name, _runs(line), final, *best, *tests, *change, *numbers])
    header = ["cell", "runs", "final", *(["best", "the paper's best"] if with_paper else [])]
    header += ["worst client" if n == WORST_CLIENT else n.removeprefix("final_test_").replace("_", " ") for n in others]
    header += [*(["difference"] if compared else []), *(COSTS[name][0] for name in costs)]
    title = f"{metric.on(table.tested_on)}{f', {metric.unit}' if metric.label != metric.words else ''}"
    return TextTable(f"{title}{_deviation(table)}; costs of a run", header, rows)


def notes(table: ResultTable) -> list[str]:
    """Paragraphs that explain the tables and figures."""
    tuning = tuning_notes(table)
    texts = [protocol(table, bool(tuning)), *(tuning or [learning_rates(table)])]
    if table.with_traffic:
        texts.append(traffic_note(table))
    for cell in table.cells.itertuples():
        if cell.paper and cell.paper.note:
            texts.append(f"The paper's value at {cell.label}: {cell.paper.note}.")
    return texts


def progress(table: ResultTable) -> str:
    """The number of finished runs, and of cells that the tables leave out."""
    finished = int(table.runs["finished"].sum())
    text = f"Finished: {finished} of {table.cells['expected'].sum()} runs"
    if started := len(table.runs) - finished:
        text += f"; unfinished: {started} (shown only where no run of the cell is finished)"
    if untested := len(table.cells) - table.counted["cell"].nunique():
        text += f"; without any test and left out: {untested} of {len(table.cells)} cells"
    return f"{text}."


def protocol(table: ResultTable, tuned: bool) -> str:
    """The examples that the metric is measured on, and how the best one and, if `tuned`, some keys are chosen."""
    held = sorted(set(table.runs["validation"].dropna()) - {0})
    images, what = ", ".join(map(str, held)), table.metric.examples
    if table.tested_on == "validation":
        return (
            f"Protocol: tested on {images} training {what} held out of training (key validation), never on the test "
            f"{what}. Use these {'accuracies' if table.metric == ACCURACY else 'values'} to choose hyper-parameters, "
            "not to report."
        )
    split = f"keys were chosen on held-out training {what}" if tuned else "no validation split"
    split = f"in some runs on {images} validation {what} instead" if held else split
    return (
        f"Protocol: tested on the test {what}, {split}. Best is the best of a run's tests, chosen on those same "
        f"{what} as the paper's code did, and so optimistic; final is the last test."
    )


def learning_rates(table: ResultTable) -> str:
    """The learning rates, where the study did not tune them."""
    keys = ("lr", "lr-scaling", "schedule")
    configs = table.cells["config"].loc[sorted(table.runs["cell"].unique())]
    held = {key: sorted({config[key] for config in configs if key in config}) for key in keys}
    shown = ", ".join(f"{key} = {' or '.join(map(str, values))}" for key, values in held.items() if values)
    return f"Learning rates: as given; {shown}."


def traffic_note(table: ResultTable) -> str:
    """How syncs and bytes are counted."""
    text = (
        "Traffic: syncs of a run, and bytes of all workers, both ways: the updates averaged and the models sent for "
        "them. What a run sent besides (for checkpoints, in repeated rounds, in updates left out) depends on its "
        "interruptions and has columns of its own in the CSV file."
    )
    if table.counted["network_peak"].notna().all():
        text += " The peak is the most that goes one way in a round, without the first model."
    if table.cells["baseline"].any():
        text += (
            " The large batch counts as data-parallel SGD on the same K workers: at every step each sends its gradient "
            "and receives the mean, 4 bytes a parameter."
        )
    if (table.cells["clients"] == 1).any():
        text += " One worker (K = 1) needs no network and counts as sending nothing."
    return text


def origins(table: ResultTable) -> list[tuple[str, str]]:
    """Commit, host, device, versions and commands of the runs, each with the number of runs that have it."""
    facts = table.runs[["commit", "host", "device", "versions", "command"]].copy()
    facts["versions"] = facts["versions"].dropna().map(lambda of: ", ".join(f"{k} {v}" for k, v in of.items()))
    counts = {name: Counter(value for value in facts[name].dropna() if value) for name in facts}
    told = [(name, _values(found)) for name, found in counts.items() if found]
    return [("folder", ", ".join(map(str, table.folders))), *told]


def runs_frame(table: ResultTable) -> pd.DataFrame:
    """A line for each run: fixed columns, and each configuration key that varies. Accuracies are fractions.

    Those of the metric, `final_` and `best_test_`, are empty for an unfinished run. Syncs and bytes are as recorded.
    """
    runs = table.runs.sort_values(["cell", "seed"], kind="stable")
    config = runs["cell"].map(table.cells["config"])
    runs = runs.assign(workers=config.map(lambda keys: keys.get("workers")))  # the key, not their number in a round
    finished, metric = runs["finished"], table.metric
    local = runs.reindex(columns=["local-steps", "local-epochs"])  # which centralized runs do not have
    frame = runs.assign(
        local_steps_per_round=local["local-steps"].where(local["local-epochs"].fillna(0) == 0),
        batch_size=runs["batch-size"],
        clients=runs["clients"].where(runs["mode"] == "localsgd"),
        tested_on=["validation" if held else "test" for held in runs["validation"].fillna(0)],
        **{
            f"last_{metric.column}": runs[metric.final],
            metric.final: runs[metric.final].where(finished),
            metric.best: runs[metric.best].where(finished),
        },
    )
    columns = [name.replace("accuracy", metric.name) for name in CSV_COLUMNS]
    keys = sorted({name for config in table.cells["config"] for name in config} & set(runs.columns))
    shown = {*CSV_COLUMNS, "local-steps", "batch-size", ARGUMENTS}  # the key of a choice shows its arguments
    varying = [name for name in keys if name not in shown and runs[name].dropna().astype(str).nunique() > 1]
    return frame[[*columns[:7], *varying, *columns[7:], *table.other_tests]]


def csv_text(frame: pd.DataFrame) -> str:
    """`frame` as CSV, without its index; an apostrophe precedes text that a spreadsheet would run as a formula."""
    return str(frame.map(_not_a_formula).convert_dtypes().to_csv(index=False))


def show_table(table: TextTable, console: Console, caption: str = "") -> None:
    """Print `table`: a line is never broken in a pipe; a terminal gets the columns for which it is wide enough."""
    left_out: list[str] = []
    widest = 2 * console.width // 5  # of cells: a longer name is folded before a column is left out
    others = [name for name in table.header if name not in (*ALWAYS_SHOWN, *LEFT_OUT_FIRST)]
    for name in (*others, *LEFT_OUT_FIRST) if console.is_terminal else ():
        if name in table.header and _width(_rich_table(table, left_out, widest), console) > console.width:
            left_out.append(name)
    shown = _rich_table(table, left_out)
    if not console.is_terminal:
        console.width = max(console.width, _width(shown, console))
    note = f"a wider terminal also shows {', '.join(left_out)}" if left_out else ""
    for part in filter(None, (table.caption, shown, caption, note)):
        console.print(part, crop=False, markup=False, highlight=False)


def _width(table: Table, console: Console) -> int:
    """The width at which no line of a table is broken."""
    return console.measure(table, options=console.options.update(width=10_000)).maximum


def _rich_table(table: TextTable, left_out: Sequence[str], widest: int | None = None) -> Table:
    """`table` without the columns `left_out`; names of cells are folded at the width `widest`."""
    shown = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    kept = [number for number, name in enumerate(table.header) if name not in left_out]
    for name in (table.header[number] for number in kept):
        if name == "cell":  # names are never cut
            shown.add_column(Text(name), overflow="fold", max_width=widest)
        else:
            shown.add_column(Text(name), justify="right", no_wrap=True)
    for row in table.rows:
        entries = [row[number] for number in kept if number < len(row)]
        shown.add_row(*(Text(f"{entry.text} ({entry.note})" if entry.note else entry.text) for entry in entries))
    return shown


def statistics(values: pd.Series, cells: pd.Series) -> pd.DataFrame:
    """The `mean`, `std` and `count` of the `values` of each cell."""
    return values.dropna().groupby(cells).agg(["mean", "std", "count"])


def number(value: float) -> str:
    """A number to three digits or, above 100, to the unit with thousands separated; a dash if it is missing."""
    if pd.isna(value):
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _runs(line: dict[str, Any]) -> Entry:
    """The finished runs of a line of `summarize`, and as a note what is unfinished or left out."""
    started = line["started"] - line["finished"]
    notes = [f"{started} unfinished, to epoch {line['reached']:.1f}"] if line["reached"] > 0 else []
    return Entry(f"{line['finished']} of {line['expected']}", ", ".join([*notes, *_left_out(line)]))


def _other_test(metric: Metric, name: str, value: float) -> str:
    return metric.number(value) if name == WORST_CLIENT and not pd.isna(value) else number(value)


def _of_paper(line: dict[str, Any]) -> Entry:
    """The paper's best accuracy of a line of `summarize`, with the difference to it as the note."""
    if line["paper"] is None:
        return Entry(NOTHING)
    value = line["paper"].best
    return Entry(f"{value:.2f}", ACCURACY.difference(line["best"] - value / 100) if line["finished"] else "")


def _left_out(line: dict[str, Any]) -> list[str]:
    """What to say of the updates left out in the runs of a line of `summarize`."""
    return [f"{number(line['left_out'])} updates left out"] if line["left_out"] else []


def _deviation(table: ResultTable) -> str:
    several = table.counted["cell"].duplicated().any()
    return ", mean ± standard deviation over seeds" if several else ""


def _values(counts: Counter[str]) -> str:
    """The values, the most frequent first, each with its number of runs if there are several."""
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{value} ({count} {'run' if count == 1 else 'runs'})" for value, count in counts.most_common())


def _not_a_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
