"""The progress of a run: a line that changes, in a terminal or notebook; elsewhere a line for each row."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from datetime import timedelta

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Column

from fedsim.config import Config, Mode
from fedsim.data.metric import metric_of
from fedsim.data.partition import images_of_epoch
from fedsim.federation.decisions import planned
from fedsim.runs.records import Row
from fedsim.runs.run import OnRow
from fedsim.runs.shown import loss_text, print_row
from fedsim.training.centralized import whole_epochs


def each(*functions: OnRow) -> OnRow:
    """A function that passes a row to each of `functions`."""

    def on_row(row: Row) -> None:
        for function in functions:
            function(row)

    return on_row


def ends_after(config: Config, mode: Mode) -> tuple[int, float]:
    """The round (centralized: epoch) after which a run stops, and the epochs it has trained by then."""
    if mode == "centralized":
        last = whole_epochs(config)[1]
        return last, float(last)
    plan = planned(config)
    return plan.last_round, float(plan.epoch(plan.last_round))


def status(row: Row, images: int, epochs: float | None, before: Row | None = None, tested: float | None = None) -> str:
    """Metric, time left, loss and examples per second of a run of `epochs` epochs, in at most 55 characters.

    An epoch has so many `images`. The speed is measured from the row `before`, or else from the start; without `epochs`
    it is left out. `tested` is shown if `row` has no test.
    """
    metric = metric_of(row)
    tested = row[metric.column] if row[metric.column] is not None else tested
    split = "test" if row["tested_on"] == "test" else "val"
    shown = f"{split} {metric.told(tested):>6}" if tested is not None else " " * 11
    parts = [shown, f"loss {loss_text(row['train_loss'])}"]
    since = before or {"epoch": 0.0, "seconds": 0.0}
    done, seconds = row["epoch"] - since["epoch"], row["seconds"] - since["seconds"]
    if epochs is not None and done > 0 and seconds > 0:
        left = timedelta(seconds=round(max(0.0, epochs - row["epoch"]) * seconds / done))
        unit = "img" if metric.examples == "images" else metric.examples
        parts.insert(1, f"{left} left")  # a narrow terminal cuts off the end
        parts.append(f"{done * images / seconds:,.0f} {unit}/s")
    return "  ".join(parts)


def is_live(console: Console) -> bool:
    """Whether `console` can show a line that changes: it is a terminal, or a notebook with ipywidgets."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal


@contextlib.contextmanager
def live_line(config: Config, mode: Mode, console: Console) -> Iterator[OnRow]:
    """Context manager: show a line at the bottom of `console`; yields a function that updates it with a row."""
    rounds, epochs = ends_after(config, mode)
    images = images_of_epoch(config, mode)
    column = TextColumn("{task.description}", table_column=Column(no_wrap=True))
    first: list[Row] = []  # of this process: the speed of a resumed run is that on this machine
    with Progress(SpinnerColumn(), column, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def on_row(row: Row) -> None:
            first[:] = first or [row]
            before = first[0] if row is not first[0] else None
            progress.update(task, description=f"round {row['round']}/{rounds}  {status(row, images, epochs, before)}")

        yield on_row


@contextlib.contextmanager
def shown_rows(config: Config, mode: Mode, console: Console) -> Iterator[OnRow]:
    """Context manager: yields a function that prints a row and, if `console` is live, updates a `live_line` below."""
    if not is_live(console):
        yield print_row
        return
    with live_line(config, mode, console) as update:
        yield each(print_row, update)
