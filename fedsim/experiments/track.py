"""Send a run's rows to an experiment tracker as well as to its folder.

A tracker is a class, by its name or as ``package.module:Class``: it is made with the folder of the run and the contents
of its config.json, called with each row, and closed by `close` where the run ends or fails.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedsim.config import Config, Engine, Mode
from fedsim.errors import UserError
from fedsim.registry import TRACKERS, failures_of
from fedsim.runs.columns import TRACKED, names_with, tests_in
from fedsim.runs.records import Row
from fedsim.runs.run import OnRow
from strategies.arguments import Choice, split_name


class TensorBoard:
    """The configuration as text, and the numbers of each row by round, in ``FOLDER/tensorboard``."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._folder = folder / "tensorboard"
        self._config = "".join(f"    {name} = {value}\n" for name, value in config.items())  # Markdown: as code
        self._writer: Any = None

    def __call__(self, row: Row) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:  # hides what was written after the checkpoint that a run resumes from
            self._writer = SummaryWriter(str(self._folder), purge_step=row["round"])
            self._writer.add_text("config", self._config, row["round"])
        for tag in dict.fromkeys((*names_with(TRACKED), *tests_in(row))):
            if row.get(tag) is not None:
                self._writer.add_scalar(tag, row[tag], row["round"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def check_tracker(name: str, engine: Engine) -> None:
    """Raise UserError if the tracker `name` is unknown or not installed, or `engine` does not track."""
    if not name:
        return
    _choice(name)
    if engine == "flower":
        raise UserError(f"track = {name} with engine = flower: its rows are written by another process: leave one out")
    if split_name(name)[0] == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise UserError(f"track = {name}: it is not installed: pip install 'fedsim[tensorboard]'")


def _choice(name: str) -> Choice:
    try:
        return TRACKERS.read(name)[0]
    except ValueError as error:
        raise UserError(f"track = {error}") from error


@contextlib.contextmanager
def tracker(name: str, folder: Path, config: Config, mode: Mode) -> Iterator[OnRow]:
    """Context manager: yields a function that gives a row to the tracker `name`; without a name it does nothing."""
    if not name:
        yield lambda row: None
        return
    made: list[Any] = []  # at the first row: before, there is no folder

    def on_row(row: Row) -> None:
        with failures_of(f"track = {name} fails"):
            if not made:
                made.append(_choice(name).make(folder, config.record(mode)))
            made[0](row)

    try:
        yield on_row
    finally:
        for each in made:
            each.close()
