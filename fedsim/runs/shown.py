"""A run's rows and outcome, as lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsim.runs.folder import ROWS
from fedsim.runs.records import Row


def print_row(row: Row) -> None:
    """Round, epoch, rate, losses and accuracy of a row, on one line of at most 79 characters."""
    tested = ""
    if row["test_accuracy"] is not None:
        split = "test" if row["tested_on"] == "test" else "val"
        tested = f"{split} {loss_text(row['test_loss'])} {row['test_accuracy']:6.2%}"
    seconds = f"{row['seconds']:.{1 if row['seconds'] < 1000 else 0}f}"
    print(
        f"round {row['round']:>6}  epoch {row['epoch']:6.2f}  lr {row['lr']:.5f}  "
        f"train {loss_text(row['train_loss'])}  {tested:17}  {seconds:>5} s",
        flush=True,
    )


def outcome_line(summary: Mapping[str, Any]) -> str:
    """The last line of a finished run: accuracies, seconds, and how many updates were left out, if any."""
    tested_on, left_out = summary.get("tested_on", "test"), summary.get("updates_left_out", 0)
    line = f"finished: {tested_on} accuracy {summary['final_test_accuracy']:.2%}"
    line += f", best {summary['best_test_accuracy']:.2%}, {summary['seconds']:.1f} s"
    return line + (f"; {left_out:,} updates left out, see left_out in {ROWS}" if left_out else "")


def loss_text(value: float | None) -> str:
    """A loss in five characters, or more for a large one."""
    return "  nan" if value is None else f"{value:.3f}"
