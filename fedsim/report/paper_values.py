"""The paper's accuracies in %, from ``studies/paper.csv``: the best test epoch, and the last as its code printed it."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from typing import NamedTuple

from fedsim.config import Value
from fedsim.experiments.study import FOLDER

CHOOSING = ("optimizer", "batch-size", "clients", "local-steps")  # an empty column fits every cell


class PaperValue(NamedTuple):
    """Accuracies in %; `final` is None where only the best is known. `note`: an optional comment."""

    best: float
    final: float | None
    note: str


def paper_value(table: str, config: Mapping[str, Value]) -> PaperValue | None:
    """The value of the paper's `table` for a cell's configuration, if it has one."""
    with (FOLDER / "paper.csv").open() as file:
        for row in csv.DictReader(file):
            fits = all(row[name] in ("", str(config.get(name))) for name in CHOOSING)
            if row["table"] == table and fits:
                return PaperValue(float(row["best"]), float(row["final"]) if row["final"] else None, row["note"])
    return None
