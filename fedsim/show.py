"""What a run says while it goes: one line for each row."""

from __future__ import annotations

from fedsim.records import Row


def print_row(row: Row) -> None:
    """Round, epoch, rate, losses and accuracy of a row, on one line."""
    tested = ""
    if row["test_accuracy"] is not None:
        tested = f"  {row['tested_on']} {row['test_accuracy']:6.2%} loss {_loss(row['test_loss'])}"
    print(
        f"round {row['round']:>4}  epoch {row['epoch']:7.2f}  lr {row['lr']:.5f}  "
        f"train loss {_loss(row['train_loss'])}{tested}  {row['seconds']:8.1f} s",
        flush=True,
    )


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
