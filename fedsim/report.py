"""Tables and plots, from the records alone."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fedsim.records import read_rows, read_summary

Cell = dict[str, Any]
COLUMNS = (
    "clients",
    "local_steps_per_round",
    "seed",
    "final_test_accuracy",
    "best_test_accuracy",
    "epoch",
    "round",
    "local_steps",
    "syncs",
    "bytes_up",
    "bytes_down",
    "seconds",
    "device",
    "commit",
)


def read_cells(folder: Path) -> list[Cell]:
    """One entry for each cell under `folder`; of an unfinished one only what its rows hold."""
    cells: list[Cell] = []
    for path in sorted(folder.glob("*/config.json")):
        config = json.loads(path.read_text())
        rows = read_rows(path.parent)
        summary = read_summary(path.parent)
        result = summary if summary and summary["finished"] else rows[-1] if rows else {}
        head = {"clients": config["clients"], "local_steps_per_round": config["local-steps"], "seed": config["seed"]}
        cells.append({**{name: result.get(name) for name in COLUMNS}, **head})
    return sorted(cells, key=lambda cell: (cell["clients"], cell["local_steps_per_round"], cell["seed"]))


def write_csv(cells: Sequence[Cell], path: Path) -> None:
    """All cells, a line each; accuracies are fractions, empty where a cell is not finished."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(cells)


def grid_table(cells: Sequence[Cell]) -> Table:
    """Final test accuracy in %, J down and K across; mean and standard deviation where there are several seeds."""
    clients = sorted({cell["clients"] for cell in cells})
    seeds = sorted({cell["seed"] for cell in cells})
    spread = "; mean ± standard deviation" if len(seeds) > 1 else ""
    table = Table(title="Final test accuracy, %", caption=f"seed {', '.join(map(str, seeds))}{spread}")
    table.add_column("J", justify="right")
    for k in clients:
        table.add_column(f"K={k}", justify="right")
    for j in sorted({cell["local_steps_per_round"] for cell in cells}):
        table.add_row(str(j), *(_percent(_accuracies(cells, k, j)) for k in clients))
    return table


def plot_grid(cells: Sequence[Cell], path: Path) -> None:
    """Final test accuracy against J, and against the number of syncs, a line for each K."""
    from matplotlib.figure import Figure  # a second to import, and only a finished grid needs it

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    by_steps, by_syncs = figure.subplots(1, 2, sharey=True)
    done = [cell for cell in cells if cell["final_test_accuracy"] is not None]
    for k in sorted({cell["clients"] for cell in done}):
        finished = [cell for cell in done if cell["clients"] == k]
        steps = sorted({cell["local_steps_per_round"] for cell in finished})
        values = [[100 * a for a in _accuracies(finished, k, j)] for j in steps]
        mean = [statistics.mean(v) for v in values]
        spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        syncs = [next(c["syncs"] for c in finished if c["local_steps_per_round"] == j) for j in steps]
        by_steps.errorbar(steps, mean, spread, marker="o", capsize=3, label=f"K = {k}")
        by_syncs.errorbar(syncs, mean, spread, marker="o", capsize=3, label=f"K = {k}")
    for axes, label in ((by_steps, "local steps a round, J"), (by_syncs, "syncs in the whole run")):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    by_steps.set_ylabel("final test accuracy, %")
    if done:
        by_steps.set_xscale("log", base=2)
        by_steps.set_xticks(sorted({cell["local_steps_per_round"] for cell in done}))
        by_syncs.set_xscale("log")
        by_steps.xaxis.set_major_formatter("{x:g}")
        by_syncs.xaxis.set_major_formatter("{x:g}")
        by_steps.legend()
    figure.savefig(path, dpi=150)


def _accuracies(cells: Sequence[Cell], clients: int, local_steps: int) -> list[float]:
    return [
        cell["final_test_accuracy"]
        for cell in cells
        if (cell["clients"], cell["local_steps_per_round"]) == (clients, local_steps)
        and cell["final_test_accuracy"] is not None
    ]


def _percent(fractions: list[float]) -> str:
    if not fractions:
        return "–"
    spread = f" ± {100 * statistics.stdev(fractions):.2f}" if len(fractions) > 1 else ""
    return f"{100 * statistics.mean(fractions):.2f}{spread}"
