"""``fedsim watch``: the progress of the runs in a folder, read from their records."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from fedsim.config import Config, Mode
from fedsim.data.datasets import recorded_examples
from fedsim.data.metric import metric_of
from fedsim.data.partition import images_of_epoch
from fedsim.errors import UserError
from fedsim.experiments.progress import ends_after, status
from fedsim.experiments.study import STORED, read_study
from fedsim.runs.folder import CONFIG, ROWS, SUMMARY, is_locked, read_config
from fedsim.runs.records import Row, read_summary
from fedsim.system.files import open_file

EVERY_SECONDS = 2.0
QUIET_SECONDS = 60.0  # without a change
LAST_BYTES = 2**16  # read from the end of a row file for its last rows


class RunState(NamedTuple):
    """The line on a run, and its state."""

    line: str
    state: Literal["finished", "unfinished", "damaged"]


def watch(root: Path, console: Console) -> None:
    """Show every run under `root`: in a terminal until no run is in progress, in a pipe once.

    No run is in progress if all are finished, or if none has changed for a minute and no process holds the lock of one.
    """
    if not root.is_dir():
        raise UserError(f"results = {root} is not a folder: give a folder of results, or of one study")
    if not console.is_terminal:
        for line in lines_of(root)[0]:
            console.print(line, soft_wrap=True, highlight=False)
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            lines, running = lines_of(root)
            room = max(1, console.size.height - 2)
            hidden = [f"... and {len(lines) - room} more"] if len(lines) > room else []
            texts = [Text(line, no_wrap=True, overflow="ellipsis") for line in hidden + lines[-room:]]
            live.update(Group(*texts), refresh=True)
            if not running:
                return
            time.sleep(EVERY_SECONDS)


def lines_of(root: Path) -> tuple[list[str], bool]:
    """A line for each study and run under `root`, unfinished runs last; and whether a run is still in progress."""
    folders: dict[Path, list[RunState]] = {}
    runs = [path.parent for path in sorted(root.rglob(CONFIG))]
    for run in runs:
        folders.setdefault(run.parent, []).append(_seen(run))
    if not folders:
        raise UserError(f"results = {root} holds no runs: give a folder of results, or of one study")
    lines, missing = [], False
    for folder, seen in folders.items():
        finished = sum(run.state == "finished" for run in seen)
        expected = max(len(seen), _expected(folder))
        missing = missing or expected > sum(run.state != "unfinished" for run in seen)
        lines.append(f"{folder}: {finished} of {expected} runs finished")
        lines += [f"  {run.line}" for run in sorted(seen, key=lambda run: run.state)]
    return lines, missing and any(map(_goes_on, runs))


def _goes_on(folder: Path) -> bool:
    """Whether the run has changed in the last minute, or a process holds its lock."""
    changed = [path.stat().st_mtime for name in (CONFIG, ROWS, SUMMARY) if (path := folder / name).exists()]
    return time.time() - max(changed, default=0.0) < QUIET_SECONDS or is_locked(folder)


def _expected(folder: Path) -> int:
    """The number of runs of the study in `folder`; 0 if it holds none."""
    try:
        return len(read_study(str(folder / STORED)).cells()) if (folder / STORED).exists() else 0
    except UserError:  # the report says what is wrong with it
        return 0


def _seen(folder: Path) -> RunState:
    """The present state of the run in `folder`, to which another process may be writing."""
    try:
        return _read(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return RunState(f"{folder.name}  cannot be read: {' '.join(str(error).split())}", "damaged")


def _read(folder: Path) -> RunState:
    held = read_config(folder)
    mode: Mode = held.pop("mode")
    known = Config().identity(mode)
    config = Config().changed({name: value for name, value in held.items() if name in known})
    summary = read_summary(folder)
    rows = list(_last_rows(folder / ROWS))
    rounds, epochs, images = _length(config, mode)
    if not rows:
        return RunState(f"{folder.name}  no rows yet", "unfinished")
    row, metric = rows[-1], metric_of(rows[-1])
    tested = [row[metric.column] for row in rows if row[metric.column] is not None]
    where = f"{folder.name}  round {row['round']}" + (rounds or f"  epoch {row['epoch']:.2f}")
    if summary and summary["finished"]:
        return RunState(
            f"{where}  {row['tested_on']} {metric.told(tested[-1] if tested else 0)}  {row['seconds']:.0f} s",
            "finished",
        )
    before = rows[0] if rows[0]["seconds"] < row["seconds"] else None
    age = max(0.0, time.time() - (folder / ROWS).stat().st_mtime)
    ago = f"  row {timedelta(seconds=round(age))} ago" if age > QUIET_SECONDS else ""
    return RunState(
        f"{where}  {status(row, images, epochs, before, tested[-1] if tested else None)}{ago}", "unfinished"
    )


def _length(config: Config, mode: Mode) -> tuple[str, float | None, int]:
    """The rounds of a run, as text after a slash, its epochs and the images of one.

    None of it without its data set on this machine, or if that is a function, which a record may not have called.
    """
    try:
        recorded_examples(config)
        images = images_of_epoch(config, mode)
        rounds, epochs = ends_after(config, mode)
    except (OSError, ValueError):
        return "", None, 0
    return f"/{rounds}", epochs, images


def _last_rows(path: Path) -> Iterator[Row]:
    """The last complete rows of a file to which another process may be writing."""
    if not path.exists():
        return
    with open_file(path) as file:
        file.seek(max(0, path.stat().st_size - LAST_BYTES))
        begins = file.tell() == 0
        lines = file.read().splitlines(keepends=True)
    for line in lines if begins else lines[1:]:
        if line.endswith(b"\n"):
            row: dict[str, Any] = {"tested_on": "test", **json.loads(line)}  # older rows do not say
            yield row
