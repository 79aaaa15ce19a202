"""How the keys of a tuned study's cells were chosen, from the trials that are stored in its folder."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from fedsim.data.metric import Metric
from fedsim.errors import UserError
from fedsim.experiments.study import STORED, TRIALS, Tune, read_study
from fedsim.report.load import escaped
from fedsim.report.result_table import ResultTable


def tuning_notes(table: ResultTable) -> list[str]:
    """A paragraph about the trials of the cells of each folder of `table` that was tuned."""
    return [note for folder in table.folders for note in _notes_of(folder, table)]


def _notes_of(folder: Path, table: ResultTable) -> list[str]:
    """The paragraph about the trials of a folder; none where its cells were not tuned."""
    path = folder / TRIALS
    if not path.exists():
        return []
    try:
        tune = read_study(str(folder / STORED)).tune
        own = table.runs[table.runs["folder"].map(lambda run: run.parent) == folder]
        cells = {re.sub(r"-seed\d+$", "", run) for run in own["run"]}
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        chosen = [line for line in lines if line["outcome"] == "chosen" and line["cell"] in cells]
        return [escaped(_paragraph(tune, chosen, table.metric))] if tune and chosen else []
    except (OSError, ValueError, KeyError, TypeError, csv.Error, UserError):
        return [f"Tuning: {escaped(path)} cannot be read."]


def _paragraph(tune: Tune, chosen: list[dict[str, str]], metric: Metric) -> str:
    keys, what = " and ".join(tune.grid), metric.examples
    grid = "; ".join(f"{key} of {', '.join(map(str, values))}" for key, values in tune.grid.items())
    choices = "; ".join(
        f"{line['cell']}: {', '.join(f'{key} = {line[key]}' for key in tune.grid if line.get(key))} "
        f"({metric.told(float(line[f'validation_{metric.name}']))})"
        for line in chosen
    )
    return (
        f"Tuning: {keys} chosen for each cell by its {metric.words} on {tune.validation} training {what} held out, "
        f"never on the test {what}: {grid}; seed {tune.seed}, {tune.budget:.0%} of the budget. Chosen, with the "
        f"{metric.words} on the held-out {what}: {choices}."
    )
