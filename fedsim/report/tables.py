"""``run.py report``: what is under a folder of results, as a page, a Markdown file, pictures and CSV.

Made from the records alone, of half-finished studies too: a cell without a finished run is a dash.
"""

from __future__ import annotations

import csv
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsim.errors import UserError
from fedsim.report.figures import plots_of, save_plot
from fedsim.report.load import CellResults, Group, read_groups
from fedsim.report.page import Figure, Grid, Section, html_page, markdown_page
from fedsim.report.paper_values import paper_value
from fedsim.report.words import NOTHING, SHORT, difference, label, percent

COLUMNS = (
    "run", "mode", "optimizer", "clients", "local_steps_per_round", "batch_size", "seed", "tested_on", "finished",
    "final_test_accuracy", "best_test_accuracy", "epoch", "round", "local_steps", "syncs", "bytes_up", "bytes_down",
    "seconds", "device", "commit",
)  # fmt: skip


def build_report(root: Path, out: Path, figure: str, console: Console) -> None:
    """Write the report on everything under `root` to `out`; or, with `figure`, that one picture and its CSV."""
    groups, warnings = read_groups(root)
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True, highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    if figure:
        _one_figure(groups, figure, root, out)
        console.print(str(out / f"{figure}.png"), soft_wrap=True, highlight=False)
        return
    command = shlex.join(["python", "run.py", "report", str(root), "-o", str(out)])
    sections = [_section(group, root, out) for group in groups]
    (out / "index.html").write_text(html_page(sections, warnings, command, out))
    (out / "report.md").write_text(markdown_page(sections, warnings, command))
    console.print(f"{out / 'index.html'}\n{out / 'report.md'}", soft_wrap=True, highlight=False)


def _one_figure(groups: Sequence[Group], figure: str, root: Path, out: Path) -> None:
    makers = {name: make for group in groups for name, make in plots_of(group).items()}
    if figure not in makers:
        raise UserError(f"figure = {figure!r} is not to be made of {root}: it must be one of {', '.join(makers)}")
    save_plot(makers[figure](), out, _figure_command(root, out, figure))


def _figure_command(root: Path, out: Path, name: str) -> str:
    return shlex.join(["python", "run.py", "report", str(root), "-o", str(out), "--figure", name])


def _section(group: Group, root: Path, out: Path) -> Section:
    figures = []
    for name, make in plots_of(group).items():
        plot = make()
        command = _figure_command(root, out, name)
        save_plot(plot, out, command)
        figures.append(Figure(name, plot.caption, command))
    write_runs(group, out / f"{group.name}-runs.csv")
    return Section(
        name=group.name,
        title=group.title,
        notes=[_progress(group), protocol(group), *_notes_on_paper(group)],
        tables=[*_pivots(group), _details(group)],
        figures=figures,
        provenance=_provenance(group),
    )


def protocol(group: Group) -> str:
    """What the accuracies of a group are of, and how the best one was chosen."""
    held = sorted({int(run.config.get("validation", 0)) for run in group.runs} - {0})
    if group.tested_on == "validation":
        return (
            f"Protocol: tested on {', '.join(map(str, held))} training images held out of training (key validation), "
            "never on the test images. For choosing hyper-parameters by, not for reporting."
        )
    split = f"in some runs {', '.join(map(str, held))} validation images instead" if held else "no validation split"
    return (
        f"Protocol: tested on the test images, {split}. Best is the best of a run's tests, "
        "chosen on those same images, as the paper's code printed it, and so optimistic; final is the last test."
    )


def _notes_on_paper(group: Group) -> list[str]:
    """What is to be known of the paper's values that stand beside those of the group."""
    values = [(cell, paper_value(group, cell)) for cell in group.cells]
    return [
        f"The paper's value at {label(group.axes, cell.place)}: {value.note}."
        for cell, value in values
        if value and value.note
    ]


def _progress(group: Group) -> str:
    expected = sum(cell.expected for cell in group.cells)
    finished = sum(len(cell.finished) for cell in group.cells)
    missing = sum(not cell.finished for cell in group.cells)
    begun = len(group.runs) - finished
    return (
        f"{finished} of {expected} runs are finished, {begun} more are begun; "
        f"{missing} of {len(group.cells)} cells have no finished run and are shown as {NOTHING}."
    )


def _pivots(group: Group) -> list[Grid]:
    """Best and final accuracy as tables of rows and columns, the paper's value and the difference in each cell."""
    if group.across == 0 or len(group.rows) < 2:
        return []
    grids = []
    for words, name in (("Best", "best_test_accuracy"), ("Final", "final_test_accuracy")):
        rows = [
            [
                label(group.axes[group.across :], row),
                *(_pivot_cell(group, column, row, name) for column in group.columns),
            ]
            for row in group.rows
        ]
        header = ["", *(label(group.axes, column) for column in group.columns)]
        grids.append(Grid(f"{words} accuracy on {group.tested_on} images, %{_spread(group)}", header, rows))
    return grids


def _pivot_cell(group: Group, column: Any, row: Any, name: str) -> str:
    cell = group.at(column, row)
    if cell is None:
        return ""
    printed = _printed(group, cell, name)
    if printed is None:
        return percent(cell.values(name))
    return f"{percent(cell.values(name))} (paper {printed:.2f}, {difference(cell.values(name), printed)})"


def _printed(group: Group, cell: CellResults, name: str) -> float | None:
    value = paper_value(group, cell)
    if value is None:
        return None
    return value.best if name == "best_test_accuracy" else value.final


def _details(group: Group) -> Grid:
    """A line for each cell: how many runs, what they reached, and what that took."""
    header = ["cell", "runs", "best", "final", "epochs", "local steps", "syncs", "MB sent", "minutes"]
    rows = []
    for cell in group.cells:
        accuracies = [percent(cell.values(f"{which}_test_accuracy")) for which in ("best", "final")]
        sent = [up + down for up, down in zip(cell.values("bytes_up"), cell.values("bytes_down"), strict=True)]
        costs = [
            _mean(cell.values("epoch"), "{:,.2f}"),
            _mean(cell.values("local_steps"), "{:,.0f}"),
            _mean(cell.values("syncs"), "{:,.0f}"),
            _mean(sent, "{:,.1f}", 1e6),
            _mean(cell.values("seconds"), "{:,.1f}", 60),
        ]
        rows.append([label(group.axes, cell.place) or group.name, _runs(cell), *accuracies, *costs])
    twins = "; the large batch is one machine and sends nothing" if group.has_twins else ""
    title = f"Every cell: accuracy on {group.tested_on} images in %{_spread(group)}; costs of a run{twins}"
    return Grid(title, header, rows)


def _runs(cell: CellResults) -> str:
    begun = [run for run in cell.runs if not run.finished and run.rows]
    far = f" ({len(begun)} at epoch {max(run.rows[-1]['epoch'] for run in begun):.1f})" if begun else ""
    return f"{len(cell.finished)} of {cell.expected}{far}"


def _mean(values: Sequence[float], form: str, unit: float = 1) -> str:
    return form.format(sum(values) / len(values) / unit) if values else NOTHING


def _spread(group: Group) -> str:
    several = any(len(cell.finished) > 1 for cell in group.cells)
    return ", mean ± standard deviation over the seeds" if several else ""


def _provenance(group: Group) -> list[tuple[str, str]]:
    """Commit, device, versions and commands of the runs that have a summary, each with how many runs it is of."""
    summaries = [run.summary for run in group.runs if run.summary]
    versions = [", ".join(f"{k} {v}" for k, v in s.get("versions", {}).items()) for s in summaries]
    told = [("folder", [str(group.folder)])]
    told += [(name, [str(s.get(name, "")) or "unknown" for s in summaries]) for name in ("commit", "device")]
    told += [("versions", versions), ("command", [str(s.get("command", "")) for s in summaries])]
    return [(name, _counted(values)) for name, values in told if values]


def _counted(values: Sequence[str]) -> str:
    counts = Counter(values)
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{value} ({count} runs)" for value, count in counts.most_common())


def write_runs(group: Group, path: Path) -> None:
    """All runs of a group, a line each; accuracies are fractions, empty where a run is not finished."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for cell in group.cells:
            for run in sorted(cell.runs, key=lambda run: run.config["seed"]):
                result = run.summary if run.finished and run.summary else run.rows[-1] if run.rows else {}
                config = run.config
                writer.writerow(
                    {
                        **{name: result.get(name) for name in COLUMNS},
                        **{name: config[name] for name in ("mode", "optimizer", "seed")},
                        "run": run.folder.name,
                        "clients": config.get("clients"),
                        "local_steps_per_round": config.get("local-steps"),
                        "batch_size": config["batch-size"],
                        "tested_on": run.tested_on,
                        "finished": run.finished,
                    }
                )


def accuracy_table(group: Group) -> Table:
    """Final accuracy in % for the terminal: the group's first axis across, the others down."""
    seeds = sorted({int(run.config["seed"]) for run in group.runs})
    spread = "; mean ± standard deviation" if len(seeds) > 1 else ""
    table = Table(title=f"Final {group.tested_on} accuracy, %", caption=f"seed {', '.join(map(str, seeds))}{spread}")
    table.add_column(", ".join(SHORT.get(name, name) for name in group.axes[group.across :]), justify="right")
    for column in group.columns:
        table.add_column(label(group.axes, column).replace(" = ", "=") or "accuracy", justify="right")
    for row in group.rows:
        table.add_row(
            " ".join(map(str, row)),
            *(_pivot_cell(group, column, row, "final_test_accuracy") for column in group.columns),
        )
    return table
