"""The accuracies of the course paper, from ``studies/paper.csv``."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from typing import NamedTuple

from fedsim.config import Value
from fedsim.experiments.study import FOLDER

KEYS = ("optimizer", "batch-size", "clients", "local-steps")  # an empty field matches every cell


class PaperValue(NamedTuple):
    """Test accuracies in %: of the best epoch, and of the last (`final`) as its code printed it, or None if unknown."""

    best: float
    final: float | None
    note: str


def paper_value(table: str, config: Mapping[str, Value]) -> PaperValue | None:
    """The value of the paper's `table` for a cell's configuration, if it has one."""
    with (FOLDER / "paper.csv").open() as file:
        for row in csv.DictReader(file):
            matches = all(row[name] in ("", str(config.get(name))) for name in KEYS)
            if row["table"] == table and matches:
                return PaperValue(float(row["best"]), float(row["final"]) if row["final"] else None, row["note"])
    return None
