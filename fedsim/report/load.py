"""Everything that runs have left under a folder, as the report and the planner see it.

Nothing here fails because of one bad record: a row, summary or configuration that cannot be read is skipped,
named and counted. Nothing is changed or written.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.config import FIELDS, Config, Mode, Value, kebab
from fedsim.errors import UserError
from fedsim.experiments.study import KEPT, TWIN, Cell, Study, read_study, study_names
from fedsim.records import Row

NOT_OF_THE_CELL = ("seed", "device", "threads")  # runs of one cell may differ in these
NEEDED = {"mode", "seed", "optimizer", "batch-size"}  # what no run's configuration lacks
NUMBERS = ("round", "epoch", "local_steps", "syncs", "bytes_up", "bytes_down")
MOST_AXES = 3  # a table of runs that differ in more keys goes by their names
Place = tuple[Value, ...]
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """One run: its configuration (with `mode`), its readable rows, and its summary if it has ended or stopped."""

    folder: Path
    config: Mapping[str, Value]
    rows: Sequence[Row]
    summary: Mapping[str, Any] | None

    @property
    def finished(self) -> bool:
        """Whether the run came to the end of its budget."""
        return self.summary is not None and self.summary["finished"] is True

    @property
    def tested(self) -> list[Row]:
        """The rows that hold a test."""
        return [row for row in self.rows if row["test_accuracy"] is not None]

    @property
    def tested_on(self) -> str:
        """``test`` or ``validation``: the images that its accuracies are of."""
        return "validation" if self.config.get("validation", 0) else "test"

    @functools.cached_property
    def identity(self) -> dict[str, Value]:
        """What makes it a run of its cell; keys younger than the run have their defaults."""
        mode: Mode = "centralized" if self.config["mode"] == "centralized" else "localsgd"
        return cell_identity({**Config().identity(mode), **self.config})


@dataclass(frozen=True)
class CellResults:
    """The runs of one cell: one for each seed, `expected` of them when all is done."""

    place: Place
    config: Mapping[str, Value]
    workers: int  # that compute at once: those sampled in a round; of a twin those of its column
    runs: Sequence[Result]
    expected: int

    @property
    def finished(self) -> list[Result]:
        """The runs that came to their end: the only ones that tables count."""
        return [run for run in self.runs if run.finished]

    def values(self, name: str) -> list[float]:
        """``name`` of the summary of each finished run that has it."""
        found = [run.summary[name] for run in self.finished if run.summary]
        return [value for value in found if value is not None]


@dataclass(frozen=True)
class Group:
    """The runs of one folder as a table: the first axis across and the others down; a single one down."""

    name: str
    title: str
    folder: Path
    axes: tuple[str, ...]
    cells: Sequence[CellResults]
    study: Study | None = None

    @property
    def across(self) -> int:
        """How many of the axes run across."""
        return 1 if len(self.axes) > 1 else 0

    @property
    def columns(self) -> list[Place]:
        """The values of the axis across."""
        return list(dict.fromkeys(cell.place[: self.across] for cell in self.cells))

    @property
    def rows(self) -> list[Place]:
        """The values of the axes down."""
        return list(dict.fromkeys(cell.place[self.across :] for cell in self.cells))

    def at(self, column: Place, row: Place) -> CellResults | None:
        """The cell at this place of the table, if there is one."""
        return next((cell for cell in self.cells if cell.place == (*column, *row)), None)

    @property
    def runs(self) -> list[Result]:
        """All runs of all cells."""
        return [run for cell in self.cells for run in cell.runs]

    @property
    def tested_on(self) -> str:
        """The images that the accuracies are of: test or validation."""
        return " and ".join(sorted({run.tested_on for run in self.runs})) or "test"

    @property
    def has_twins(self) -> bool:
        """Whether there are large-batch twins among the cells."""
        return any(cell.place[-1:] == (TWIN,) for cell in self.cells)


def read_groups(root: Path) -> tuple[list[Group], list[str]]:
    """The groups of runs under `root`, one for each folder that holds runs, and the warnings."""
    warnings: list[str] = []
    root = root.expanduser()
    if (root / "config.json").is_file():
        raise UserError(f"{root} is one run: give the folder that holds it")
    results = read_results(root, warnings.append)
    if not results:
        raise UserError(f"{root} holds no runs: give a folder of results, for instance results")
    _warn_of_namesakes(results, warnings.append)
    folders = sorted({result.folder.parent for result in results})
    groups = []
    for folder in folders:
        name = "-".join(folder.relative_to(root).parts) or folder.resolve().name
        groups += _groups_of(name, folder, [r for r in results if r.folder.parent == folder], warnings.append)
    return groups, warnings


def read_results(root: Path, warn: Warn) -> list[Result]:
    """Every run at any depth under `root`; `warn` is called with what was skipped."""
    results = []
    for path in sorted(root.rglob("config.json")):
        config = _read_object(path, warn)
        if not config or not config.keys() >= NEEDED or config["mode"] not in ("centralized", "localsgd"):
            warn(f"{path.parent}: no run's configuration, the folder is left out")
            continue
        summary = _read_object(path.with_name("summary.json"), warn)
        if summary is not None and "finished" not in summary:
            warn(f"{path.with_name('summary.json')}: no run's summary, it is left out")
            summary = None
        results.append(Result(path.parent, config, _read_rows(path.with_name("metrics.jsonl"), warn), summary))
    return results


def inferred_group(folder: Path, results: Sequence[Result], axes: Sequence[str] = ()) -> Group:
    """The table of runs that no study describes: by `axes`, or the keys in which they differ, or just by name."""
    held = [result.identity for result in results]
    names = ["mode", *(kebab(name) for name in FIELDS)]
    differing = list(axes) or [n for n in names if len({str(config[n]) for config in held if n in config}) > 1]
    cells: dict[Place, list[Result]] = {}
    for result in results:
        place: Place = tuple(result.identity.get(name, "–") for name in differing)
        if len(differing) > MOST_AXES or "mode" in differing:
            place = (re.sub(r"-seed\d+$", "", result.folder.name),)
        cells.setdefault(place, []).append(result)
    if len(differing) > MOST_AXES or "mode" in differing:
        differing = ["run"]
    seeds = len({result.config["seed"] for result in results})
    found = [
        CellResults(place, cells[place][0].config, _at_once(cells[place][0].config), cells[place], seeds)
        for place in sorted(cells, key=lambda place: [(isinstance(v, str), v) for v in place])
    ]
    return Group(folder.name, folder.name, folder, tuple(differing), found)


def _at_once(config: Mapping[str, Value]) -> int:
    """The workers that a round of `config` trains; one where it is centralized."""
    if config.get("mode") != "localsgd":
        return 1
    return Config(clients=int(config["clients"]), fraction=float(config.get("fraction", 1.0))).clients_per_round


def cell_identity(config: Mapping[str, Value]) -> dict[str, Value]:
    """The part of a run's configuration that all runs of its cell share."""
    return {name: value for name, value in config.items() if name not in NOT_OF_THE_CELL}


def _groups_of(name: str, folder: Path, results: list[Result], warn: Warn) -> list[Group]:
    """The folder's runs as the table of the study of its name, then those that are not as the study says."""
    results = _once_each(results, warn)
    study = _study_of(folder, warn)
    if study is None:
        return [dataclasses.replace(inferred_group(folder, results), name=name)]
    cells: dict[Place, list[Cell]] = {}
    for cell in study.cells():
        cells.setdefault(cell.place, []).append(cell)
    found, strangers = [], list(results)
    for place, (cell, *_) in cells.items():
        identity = cell_identity({"mode": cell.mode, **cell.config.identity(cell.mode)})
        own = [result for result in results if result.identity == identity]
        strangers = [result for result in strangers if result.identity != identity]
        workers = int(place[0]) if place[-1:] == (TWIN,) else _at_once(identity)
        found.append(CellResults(place, identity, workers, own, max(len(study.seeds), len(own))))
    groups = [Group(name, study.title, folder, study.axes, found, study)]
    if strangers:
        others = ", ".join(result.folder.name for result in strangers)
        warn(f"{folder}: {len(strangers)} runs are not as the study {study.name} says, shown apart: {others}")
        other = inferred_group(folder, strangers)
        title = f"{study.name}: other configurations"
        groups.append(dataclasses.replace(other, name=f"{name}-other", title=title))
    return groups


def _study_of(folder: Path, warn: Warn) -> Study | None:
    """The study that is kept beside the runs, or else the one of the folder's name."""
    kept = folder / KEPT
    try:
        if kept.is_file():
            return read_study(str(kept))
    except UserError as error:
        warn(f"{folder}: {error}; the folder is shown without its study")
        return None
    return read_study(folder.name) if folder.name in study_names() else None


def _once_each(results: list[Result], warn: Warn) -> list[Result]:
    """Without the runs whose configuration and seed another run of the folder has too."""
    found: dict[str, Result] = {}
    for result in results:
        key = json.dumps({**result.identity, "seed": result.config["seed"]}, sort_keys=True)
        if key in found:
            warn(f"{result.folder} is the same run as {found[key].folder.name}: it is left out")
        found.setdefault(key, result)
    return list(found.values())


def _warn_of_namesakes(results: Sequence[Result], warn: Warn) -> None:
    """Two folders of one study and one name, with different configurations, are two experiments under one name."""
    first: dict[tuple[str, str], Result] = {}
    for result in results:
        other = first.setdefault((result.folder.parent.name, result.folder.name), result)
        names = [n for n in result.identity.keys() | other.identity if result.identity.get(n) != other.identity.get(n)]
        if names:
            name = min(names)
            warn(
                f"{other.folder} and {result.folder} have one name and different configurations "
                f"({name} = {other.identity.get(name)} and {result.identity.get(name)}): both are shown"
            )


def _read_object(path: Path, warn: Warn) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warn(f"{path}: damaged ({error}), it is left out")
        return None
    return content if isinstance(content, dict) else {}


def _read_rows(path: Path, warn: Warn) -> list[Row]:
    rows: list[Row] = []
    broken: list[int] = []
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            whole = all(isinstance(row[name], int | float) for name in NUMBERS)
            whole = whole and isinstance(row["test_accuracy"], float | int | None)
        except (ValueError, KeyError, TypeError):
            whole = False
        if whole:
            rows.append(row)
        else:
            broken.append(number)
    if broken:
        warn(f"{path}: {len(broken)} broken rows are skipped, line {', '.join(map(str, broken))}")
    return rows
