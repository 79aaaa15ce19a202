"""The paper's accuracies in %, from ``studies/paper.csv``: the best test epoch, and the last as its code printed it."""

from __future__ import annotations

import csv
import functools
from typing import NamedTuple

from fedsim.experiments.study import FOLDER
from fedsim.report.load import CellResults, Group

CHOOSING = ("optimizer", "batch-size", "clients", "local-steps")  # an empty column fits every cell


class PaperValue(NamedTuple):
    """Accuracies in %; the last epoch's is not known of every cell. `note`: what is to be known of it, or nothing."""

    best: float
    final: float | None
    note: str


def paper_value(group: Group, cell: CellResults) -> PaperValue | None:
    """The paper's value to set beside `cell`, if its study names a table and that has one."""
    if group.study is None or not group.study.compare:
        return None
    for row in _rows():
        fits = all(row[name] in ("", str(cell.config.get(name))) for name in CHOOSING)
        if row["table"] == group.study.compare and fits:
            return PaperValue(float(row["best"]), float(row["final"]) if row["final"] else None, row["note"])
    return None


@functools.cache
def _rows() -> list[dict[str, str]]:
    with (FOLDER / "paper.csv").open() as file:
        return list(csv.DictReader(file))
