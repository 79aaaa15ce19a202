"""A run's rows and outcome, as lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsim.data.metric import metric_of
from fedsim.runs.folder import ROWS
from fedsim.runs.records import Row


def print_row(row: Row) -> None:
    """Round, epoch, rate, losses and metric of a row, on one line of at most 79 characters."""
    tested, metric = "", metric_of(row)
    if (value := row[metric.column]) is not None:
        split = "test" if row["tested_on"] == "test" else "val"
        told = "" if metric.column == "test_loss" else f" {metric.told(value):>6}"
        tested = f"{split} {loss_text(row['test_loss'])}{told}"
    seconds = f"{row['seconds']:.{1 if row['seconds'] < 1000 else 0}f}"
    print(
        f"round {row['round']:>6}  epoch {row['epoch']:6.2f}  lr {row['lr']:.5f}  "
        f"train {loss_text(row['train_loss'])}  {tested:17}  {seconds:>5} s",
        flush=True,
    )


def outcome_line(summary: Mapping[str, Any]) -> str:
    """The last line of a finished run: its metric, seconds, and how many updates were left out, if any."""
    tested_on, left_out = summary.get("tested_on", "test"), summary.get("updates_left_out", 0)
    metric = metric_of(summary)
    line = f"finished: {tested_on} {metric.words} {metric.told(summary[metric.final])}"
    line += f", best {metric.told(summary[metric.best])}, {summary['seconds']:.1f} s"
    return line + (f"; {left_out:,} updates left out, see left_out in {ROWS}" if left_out else "")


def loss_text(value: float | None) -> str:
    """A loss in five characters, or more for a large one."""
    return "  nan" if value is None else f"{value:.3f}"
