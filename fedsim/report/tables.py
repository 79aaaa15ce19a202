"""Text tables of a `ResultTable`: accuracies, costs, notes and origins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
from rich.table import Table
from rich.text import Text

from fedsim.config import ARGUMENTS
from fedsim.report.result_table import NOTHING, SYMBOLS, ResultTable
from fedsim.report.tuning import tuning_notes

CSV_COLUMNS = (
    "run", "mode", "optimizer", "clients", "local_steps_per_round", "batch_size", "seed", "tested_on", "finished",
    "final_test_accuracy", "best_test_accuracy", "last_test_accuracy", "epoch", "round", "steps_done", "syncs",
    "bytes_up", "bytes_down", "overhead_bytes_up", "overhead_bytes_down", "updates_left_out",
    "seconds", "device", "commit",
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


class CostColumn(NamedTuple):
    """How a cost is shown: the title of its column, its unit, and the number of decimals."""

    title: str
    unit: float = 1
    decimals: int = 0

    def entry(self, value: float) -> Entry:
        """`value` as text."""
        return Entry(number(value / self.unit, self.decimals))


COSTS = {
    "epoch": CostColumn("epochs", decimals=2),
    "steps_done": CostColumn("local steps"),
    "network_syncs": CostColumn("syncs"),
    "network_bytes": CostColumn("MB sent", 1e6, 1),
    "overhead_bytes": CostColumn("MB besides", 1e6, 1),
    "seconds": CostColumn("minutes", 60, 1),
}
TRAFFIC = ("network_syncs", "network_bytes", "overhead_bytes")


def summarize(table: ResultTable) -> pd.DataFrame:
    """A line for each tested cell, over its `counted` runs.

    `best`, `final` (means, fractions), `best_std`, `final_std` (NaN for one run), the means of `COSTS`, `left_out` (the
    sum of updates left out), `finished` and `started` (numbers of runs), `reached` (the last epoch of unfinished runs),
    and the columns of the cell.
    """
    by_cell = table.counted.groupby("cell")
    accuracy = by_cell.agg(
        best=("best_test_accuracy", "mean"),
        best_std=("best_test_accuracy", "std"),
        final=("final_test_accuracy", "mean"),
        final_std=("final_test_accuracy", "std"),
        left_out=("updates_left_out", "sum"),
    )
    every = table.runs.groupby("cell")
    runs = every.agg(finished=("finished", "sum"), started=("finished", "size"))
    unfinished = table.runs[~table.runs["finished"]]
    runs["reached"] = unfinished.groupby("cell")["epoch"].max()
    return table.cells.join([accuracy, by_cell[list(COSTS)].mean(), runs], how="inner").sort_index()


def accuracy_table(table: ResultTable, which: str) -> TextTable:
    """The ``best`` or ``final`` accuracy of each tested cell, with the value of the paper; the first axis is across."""
    summary = summarize(table)
    summary["entry"] = [_accuracy(line, which) for line in summary.to_dict("records")]
    order = {"index": table.ordered(summary, "row"), "columns": table.ordered(summary, "column")}
    pivot = summary.pivot(index="row", columns="column", values="entry").reindex(**order)
    rows = [
        [Entry(str(row)), *(entry if isinstance(entry, Entry) else Entry(NOTHING) for entry in line)]
        for row, line in zip(pivot.index, pivot.to_numpy(), strict=True)
    ]
    caption = f"{which.capitalize()} accuracy on {table.tested_on} images, %{_deviation(table)}"
    return TextTable(caption, ["", *(column or "accuracy" for column in pivot.columns)], rows)


def cost_table(table: ResultTable) -> TextTable:
    """A line for each tested cell: its number of runs, its accuracies, and the mean costs of a run."""
    shown = [name for name in COSTS if table.with_traffic or name not in TRAFFIC]
    rows = []
    for line in summarize(table).to_dict("records"):
        started = line["started"] - line["finished"]
        note = [f"{started} unfinished, to epoch {line['reached']:.1f}"] if line["reached"] > 0 else []
        note += _left_out(line)
        rows.append(
            [
                Entry(line["label"] or table.name),
                Entry(f"{line['finished']} of {line['expected']}", ", ".join(note)),
                Entry(percent(line["best"], line["best_std"])),
                Entry(percent(line["final"], line["final_std"])),
                *(COSTS[name].entry(line[name]) for name in shown),
            ]
        )
    header = ["cell", "runs", "best", "final", *(COSTS[name].title for name in shown)]
    return TextTable(f"Accuracy on {table.tested_on} images, %{_deviation(table)}; costs of a run", header, rows)


def notes(table: ResultTable) -> list[str]:
    """Paragraphs that explain the tables and figures."""
    tuning = tuning_notes(table)
    texts = [progress(table), protocol(table, bool(tuning)), *(tuning or [learning_rates(table)])]
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
    """The images that accuracies are measured on, and how the best one and, if `tuned`, some keys are chosen."""
    held = sorted(set(table.runs["validation"].dropna()) - {0})
    images = ", ".join(map(str, held))
    if table.tested_on == "validation":
        return (
            f"Protocol: tested on {images} training images held out of training (key validation), never on the test "
            "images. Use these accuracies to choose hyper-parameters, not to report."
        )
    split = "keys were chosen on held-out training images" if tuned else "no validation split"
    split = f"in some runs on {images} validation images instead" if held else split
    return (
        f"Protocol: tested on the test images, {split}. Best is the best of a run's tests, chosen on those same "
        "images as the paper's code did, and so optimistic; final is the last test."
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
        "interruptions and has a column of its own."
    )
    if table.cells["baseline"].any():
        text += (
            " The large batch counts as data-parallel SGD on the same K workers: at every step each sends its gradient "
            "and receives the mean, 4 bytes a parameter."
        )
    if (table.cells["clients"] == 1).any():
        text += " One worker (K = 1) needs no network and counts as sending nothing."
    return text


def origins(table: ResultTable) -> list[tuple[str, str]]:
    """Commit, device, versions and commands of the runs, each with the number of runs that have it."""
    facts = table.runs[["commit", "device", "versions", "command"]].copy()
    facts["versions"] = facts["versions"].dropna().map(lambda of: ", ".join(f"{k} {v}" for k, v in of.items()))
    counts = {name: Counter(value for value in facts[name].dropna() if value) for name in facts}
    told = [(name, _values(found)) for name, found in counts.items() if found]
    return [("folder", str(table.folder)), *told]


def runs_frame(table: ResultTable) -> pd.DataFrame:
    """A line for each run: fixed columns, and each configuration key that varies. Accuracies are fractions.

    `final_` and `best_test_accuracy` are empty for an unfinished run. Syncs and bytes are as recorded.
    """
    runs = table.runs.sort_values(["cell", "seed"], kind="stable")
    config = runs["cell"].map(table.cells["config"])
    runs = runs.assign(workers=config.map(lambda keys: keys.get("workers")))  # the key, not their number in a round
    finished = runs["finished"]
    local = runs.reindex(columns=["local-steps", "local-epochs"])  # which centralized runs do not have
    frame = runs.assign(
        local_steps_per_round=local["local-steps"].where(local["local-epochs"].fillna(0) == 0),
        batch_size=runs["batch-size"],
        clients=runs["clients"].where(runs["mode"] == "localsgd"),
        tested_on=["validation" if held else "test" for held in runs["validation"].fillna(0)],
        last_test_accuracy=runs["final_test_accuracy"],
        final_test_accuracy=runs["final_test_accuracy"].where(finished),
        best_test_accuracy=runs["best_test_accuracy"].where(finished),
    )
    keys = sorted({name for config in table.cells["config"] for name in config} & set(runs.columns))
    shown = {*CSV_COLUMNS, "local-steps", "batch-size", ARGUMENTS}  # the key of a choice shows its arguments
    varying = [name for name in keys if name not in shown and runs[name].dropna().astype(str).nunique() > 1]
    return frame[[*CSV_COLUMNS[:7], *varying, *CSV_COLUMNS[7:]]]


def csv_text(frame: pd.DataFrame) -> str:
    """`frame` as CSV, without its index; an apostrophe precedes text that a spreadsheet would run as a formula."""
    return str(frame.map(_not_a_formula).convert_dtypes().to_csv(index=False))


def rich_table(table: TextTable, caption: str = "") -> Table:
    """`table` for the terminal."""
    shown = Table(title=Text(table.caption), caption=Text(caption))
    for name in table.header:
        shown.add_column(Text(name), justify="left" if name == "cell" else "right", no_wrap=name == "cell")
    for row in table.rows:
        shown.add_row(*(Text(f"{entry.text} ({entry.note})" if entry.note else entry.text) for entry in row))
    return shown


def terminal_table(table: ResultTable) -> Table:
    """Final accuracies for the terminal."""
    seeds = ", ".join(map(str, sorted(set(table.runs["seed"]))))
    text = accuracy_table(table, "final")
    corner = ", ".join(SYMBOLS.get(axis, axis) for axis in table.row_axes)
    ticks = dict(zip(table.cells["row"], table.cells["tick"], strict=True))
    rows = [[Entry(ticks[row[0].text]), *row[1:]] for row in text.rows]
    return rich_table(TextTable(text.caption, [corner, *text.header[1:]], rows), f"seed {seeds}")


def statistics(values: pd.Series, cells: pd.Series) -> pd.DataFrame:
    """The `mean`, `std` and `count` of the `values` of each cell."""
    return values.dropna().groupby(cells).agg(["mean", "std", "count"])


def percent(mean: float, deviation: float = float("nan")) -> str:
    """A fraction in %, with its standard deviation if there is one."""
    return f"{100 * mean:.2f}" + (f" ± {100 * deviation:.2f}" if pd.notna(deviation) else "")


def number(value: float, decimals: int = 0) -> str:
    """A number with thousands separated; a dash if it is missing."""
    return f"{value:,.{decimals}f}" if pd.notna(value) else NOTHING


def _accuracy(line: dict[str, Any], which: str) -> Entry:
    """The accuracy of a line of `summarize`, with that of the paper and the difference as its note."""
    remarks = [] if line["finished"] else [f"unfinished, epoch {line['reached']:.1f}"]
    paper = line["paper"]
    printed = None if paper is None else paper.best if which == "best" else paper.final
    if printed is not None:
        remarks.append(f"paper {printed:.2f}")
        if line["finished"]:
            remarks.append(f"{100 * line[which] - printed:+.2f}".replace("-", "−"))
    return Entry(percent(line[which], line[f"{which}_std"]), ", ".join([*remarks, *_left_out(line)]))


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
