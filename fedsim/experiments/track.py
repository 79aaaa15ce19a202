"""Send a run's rows to an experiment tracker as well as to its folder."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from fedsim.config import Engine
from fedsim.errors import UserError
from fedsim.records import OnRow, Row

TRACKERS = ("", "tensorboard")
TRACKED = ("train_loss", "test_loss", "test_accuracy", "lr", "epoch", "bytes_up", "bytes_down", "seconds")


def check_tracker(name: str, engine: Engine) -> None:
    """Raise UserError if the tracker `name` is unknown or not installed, or `engine` does not track."""
    if name not in TRACKERS:
        raise UserError(f"track = {name!r} is unknown: it must be one of {', '.join(filter(None, TRACKERS))}")
    if name and engine == "flower":
        raise UserError(f"track = {name} with engine = flower: its rows are written by another process: leave one out")
    if name and importlib.util.find_spec(name) is None:
        raise UserError(f"track = {name}: it is not installed: pip install 'fedsim[{name}]'")


@contextlib.contextmanager
def tracker(name: str, folder: Path) -> Iterator[OnRow]:
    """Context manager: yields a function that writes the numbers of a row to ``FOLDER/tensorboard``, by round.

    Without a name it does nothing.
    """
    if not name:
        yield lambda row: None
        return
    from torch.utils.tensorboard import SummaryWriter

    writers: list[SummaryWriter] = []

    def on_row(row: Row) -> None:
        if not writers:  # hides what was written after the checkpoint that a run resumes from
            writers.append(SummaryWriter(str(folder / name), purge_step=row["round"]))
        for tag in TRACKED:
            if row[tag] is not None:
                writers[0].add_scalar(tag, row[tag], row["round"])

    try:
        yield on_row
    finally:
        for writer in writers:
            writer.close()
