"""``run.py paper``: named studies, each run a normal run in results/STUDY/CELL-seedS, finished ones skipped."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsim.errors import UserError
from fedsim.experiments.cells import Spread, cost, fail_if_any, placed, room_for, run_cells
from fedsim.experiments.execute import Engine
from fedsim.experiments.study import KEPT, Cell, Study, read_study, study_names
from fedsim.records import written_whole
from fedsim.report.page import show_results

IMAGES_A_SECOND = 1000  # the pace at which the list counts hours


def list_studies(seeds: Sequence[int], console: Console) -> None:
    """What each study would cost, from its file alone."""
    table = Table(title="Studies", caption=f"hours at {IMAGES_A_SECOND:,} training images a second")
    for name in ("study", "what it asks", "cells", "seeds", "M images", "M local steps", "M syncs", "hours"):
        table.add_column(name, justify="left" if name in ("study", "what it asks") else "right")
    for study in map(read_study, study_names()):
        cells = study.cells(seeds)
        images, steps, syncs = (sum(part) for part in zip(*(cost(c.config, c.mode) for c in cells), strict=True))
        count = len(seeds or study.seeds)
        numbers = [f"{len(cells) // count}", f"{count}", *(f"{n / 1e6:,.2f}" for n in (images, steps, syncs))]
        table.add_row(study.name, study.title, *numbers, f"{images / IMAGES_A_SECOND / 3600:,.1f}")
    console.print(table)


def run_studies(
    names: Sequence[str],
    seeds: Sequence[int],
    keys: Mapping[str, Any],
    results_dir: Path,
    engine: Engine,
    rerun: bool,
    console: Console,
    spread: Spread | None = None,
    precision: str = "",
    only: Sequence[str] = (),
) -> None:
    """Run the studies one after the other, all checked before the first begins; then each one's table.

    `keys` go to every run; they shape no result but by device and threads. With `precision`, each study is that which
    `Study.in_precision` makes of it, in a folder of its own. With `only`, its cells whose names fit one of these.
    """
    plans = []
    for study in map(read_study, names):
        study = study.in_precision(precision) if precision else study
        folder = results_dir.expanduser().absolute() / study.name
        plans.append((study, folder, placed(_chosen(study, seeds, keys, only), folder, spread)))
    failures: dict[str, str] = {}
    with room_for([cell for _, _, cells in plans for cell in cells], spread):
        for study, folder, cells in plans:
            folder.mkdir(parents=True, exist_ok=True)
            with written_whole(folder / KEPT) as file:
                file.write(study.text.encode())
            failed = run_cells(cells, engine, rerun, console, spread)
            failures |= {f"{study.name}/{name}": why for name, why in failed.items()}
            show_results(folder, console)
            console.print(f"python run.py report {folder} -o report", soft_wrap=True, highlight=False)
    fail_if_any(failures, sum(len(cells) for _, _, cells in plans))


def _chosen(study: Study, seeds: Sequence[int], keys: Mapping[str, Any], only: Sequence[str]) -> list[Cell]:
    """The cells of a study whose names, the seed left out, fit one of the patterns `only`; all, without any."""
    cells = study.cells(seeds, keys)
    names = [str(cell.config.name).rpartition("-seed")[0] for cell in cells]
    for pattern in only:
        if not fnmatch.filter(names, pattern):
            there = ", ".join(dict.fromkeys(names))
            raise UserError(f"cells = {pattern!r} fits no cell of {study.name}: it has {there}")
    fitting = {name for pattern in only or ["*"] for name in fnmatch.filter(names, pattern)}
    return [cell for cell, name in zip(cells, names, strict=True) if name in fitting]
