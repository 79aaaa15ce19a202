"""Arrange runs in tables: one for each folder of runs, by its study or by the keys in which its runs differ.

Studies that belong `together` are one table, in which a cell's method is what its choices differ in.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from fedsim.config import BUDGET, Config, Value
from fedsim.data.metric import ACCURACY, Metric
from fedsim.errors import UserError
from fedsim.experiments.study import FOLDER, LARGE_BATCH, STORED, Study, compared_axis, read_study, study_names
from fedsim.network import is_summed
from fedsim.report.load import Records, cell_identity, escaped, read_records
from fedsim.report.network import add_traffic
from fedsim.runs.columns import Costs
from fedsim.runs.folder import CONFIG, differences
from strategies.arguments import split_name

MOST_AXES = 3  # runs that differ in more keys are listed by name
LONGEST_NAME = 150  # bytes of a table's name, a prefix of its file names
PAPER_KEYS = ("optimizer", "batch-size", "clients", "local-steps")  # an empty field matches every cell
SYMBOLS = {"clients": "K", "local-steps": "J", "local-epochs": "E", "batch-size": "batch"}
NOTHING = "–"
METHOD = "method"  # an axis of studies that are shown together
PLAIN = "LocalSGD"  # the method of a cell all of whose choices are the usual ones


class PaperValue(NamedTuple):
    """Test accuracies of the course paper in %. `final`: of the last epoch, as its code printed it; None if unknown."""

    best: float
    final: float | None
    note: str


class About(NamedTuple):
    """What a table is called, and the folder of its runs."""

    name: str
    title: str
    folder: Path


@dataclass(frozen=True)
class ResultTable:
    """The runs of one folder, or of the folders of studies that are shown together.

    `question`: that it answers; `about`: the axis whose values it compares ("": none).
    `axes`: the keys that distinguish cells. With several, the first varies across columns and the others down rows.
    `cells`: a line for each cell, in the order of the table: `coords` (a value for each axis) and, as text, `column`,
    `row`, `label` (both) and `tick` (the row's values); `config`, `expected` (number of runs), `clients`,
    `workers` (per round), `baseline` (whether it is the large-batch baseline of K workers), `summed` (whether its
    updates can be summed on their way, see `network`), `paper` (its values or None).
    `runs` and `rows`: as in `Records`, with `cell`, the index of the cell, its `clients`, `workers`, `baseline` and
    `summed`, and the traffic (see `network.add_traffic`).
    """

    name: str
    title: str
    folders: tuple[Path, ...]
    axes: tuple[str, ...]
    cells: pd.DataFrame
    runs: pd.DataFrame
    rows: pd.DataFrame
    question: str = ""
    about: str = ""
    together: str = ""

    @property
    def row_axes(self) -> tuple[str, ...]:
        """The axes that vary down the rows."""
        return self.axes[1:] or self.axes

    def ordered(self, cells: pd.DataFrame, name: str) -> list[str]:
        """The values of the column `name` of some `cells`, in the order of the table."""
        there = set(cells[name])
        return [value for value in self.cells[name].unique() if value in there]

    @property
    def metric(self) -> Metric:
        """What the runs are compared by."""
        return next(iter(self.runs["metric"]), ACCURACY)

    def with_coords(self, points: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
        """The coordinates of each point's cell, a column for each axis of the table, then `columns` of `points`."""
        coords = pd.DataFrame(list(self.cells["coords"]), columns=list(self.axes), dtype=object)
        parts = [coords.loc[points["cell"]], points[list(columns)]]
        return pd.concat([part.reset_index(drop=True) for part in parts], axis="columns")

    @property
    def other_tests(self) -> list[str]:
        """The columns of `runs` for numbers that were tested besides the metric."""
        other = {self.metric.final, *self.lists}
        names = [name for name in self.runs if name.startswith("final_test_") and name not in other]
        return [name for name in names if self.runs[name].notna().any()]

    @property
    def lists(self) -> list[str]:
        """The columns of `runs` for what was tested of each class or client."""
        names = [name for name in self.runs if name.startswith("final_test_")]
        return sorted(name for name in names if self.runs[name].map(lambda value: isinstance(value, list)).any())

    @property
    def tested_on(self) -> str:
        """The examples that the metric is measured on: test, validation, or both."""
        held_out = self.runs["validation"].fillna(0) > 0
        return " and ".join(sorted({"validation" if held else "test" for held in held_out})) or "test"

    @property
    def counted(self) -> pd.DataFrame:
        """The tested runs that tables and curves show: the finished ones of a cell, or all if none is finished."""
        tested = self.runs[self.runs[self.metric.final].notna()]
        return tested[tested["finished"] | ~tested["cell"].isin(tested["cell"][tested["finished"]])]

    @property
    def with_traffic(self) -> bool:
        """Whether any run has network traffic."""
        return bool((self.runs["network_bytes"] > 0).any())


def read_tables(root: Path) -> tuple[list[ResultTable], list[str]]:
    """The tables of all runs under `root`, and warnings. Raises UserError if there are no runs."""
    shown = escaped(root)
    try:
        if (root / CONFIG).is_file():
            raise UserError(f"{shown} is one run: give the folder that holds it")
        records = read_records(root)
    except OSError as error:
        raise UserError(f"results = {shown} cannot be read ({error.strerror}): give a folder of results") from error
    if records.runs.empty:
        why = f" ({records.warnings[0]})" if records.warnings else ""
        raise UserError(f"{shown} holds no runs{why}: give a folder of results, for instance results")
    _warn_of_equal_names(records)
    tables: list[ResultTable] = []
    parents = records.runs["folder"].map(lambda path: path.parent)
    metrics_of = records.runs.groupby(parents)["metric"].nunique()
    for (folder, metric), runs in records.runs.groupby([parents, records.runs["metric"].map(str)]):
        name = _file_name("-".join(folder.relative_to(root).parts) or folder.resolve().name)
        mixed = metrics_of[folder] > 1
        name = _file_name(f"{name}-{metric}") if mixed else name
        taken = {table.name for table in tables}
        name = next(n for n in [name, *(f"{name}-{i}" for i in range(2, len(tables) + 3))] if n not in taken)
        found = _tables_of(name, folder, _without_duplicates(runs, records.warnings), records)
        tables += [replace(table, title=f"{table.title}: {metric}") if mixed else table for table in found]
    return _shown_together(tables), records.warnings


def joined(name: str, title: str, tables: Sequence[ResultTable]) -> ResultTable:
    """The cells of several tables in one.

    Its axes are the method and the axes that all have or, where these do not tell the cells apart, the tables and the
    labels of their cells.
    """
    shared = [axis for axis in tables[0].axes if all(axis in table.axes for table in tables)]
    found = iter(method_names([config for table in tables for config in table.cells["config"]], shared))
    methods_of = [(table, [next(found) for _ in range(len(table.cells))]) for table in tables]
    methods_of.sort(key=lambda pair: PLAIN not in pair[1])  # what the others are compared with stands first
    axes = (METHOD, *shared)
    coords: list[tuple[Value, ...]] = [
        (method, *(own[table.axes.index(axis)] for axis in shared))
        for table, methods in methods_of
        for method, own in zip(methods, table.cells["coords"], strict=True)
    ]
    tables = [table for table, _ in methods_of]
    if len(set(coords)) < len(coords):
        axes = ("study", "cell")
        coords = [(table.name, text) for table in tables for text in table.cells["label"]]
    cells = pd.concat([table.cells for table in tables], ignore_index=True)
    cells = cells.assign(coords=coords, **pd.DataFrame([_names(axes, own) for own in coords]))
    runs, rows, cell, run = [], [], 0, 0
    for table in tables:  # runs that were read apart have equal numbers
        runs.append(table.runs.assign(cell=table.runs["cell"] + cell).set_axis(table.runs.index + run))
        rows.append(table.rows.assign(cell=table.rows["cell"] + cell, run=table.rows["run"] + run))
        cell, run = cell + len(table.cells), run + table.runs.index.max() + 1
    folders = tuple(folder for table in tables for folder in table.folders)
    about = (tables[0].question, axes[0], title)
    return ResultTable(name, title, folders, axes, cells, pd.concat(runs), pd.concat(rows), *about)


def split_by(table: ResultTable, keys: Sequence[str]) -> list[ResultTable]:
    """A table for each combination of the values that cells have of those of `keys` that are axes."""
    axes = [axis for axis in table.axes if axis in keys]
    if not axes:
        return [table]
    names = table.cells["coords"].map(lambda own: label(axes, [own[table.axes.index(axis)] for axis in axes]))
    return [
        replace(
            table,
            name=_file_name(f"{table.name}-{name}"),
            title=f"{table.title}, {name}",
            cells=cells,
            runs=table.runs[table.runs["cell"].isin(cells.index)],
            rows=table.rows[table.rows["cell"].isin(cells.index)],
        )
        for name, cells in table.cells.groupby(names, sort=False)
    ]


def _shown_together(tables: list[ResultTable]) -> list[ResultTable]:
    """`tables`, with one in place of those that belong together, where the first of them was."""
    found: dict[str, list[ResultTable]] = {}
    for table in tables:
        found.setdefault(table.together or f"\n{table.name}", []).append(table)  # no title has a line break
    return [
        parts[0] if len(parts) == 1 else joined(_file_name(title.partition(":")[0]), title, parts)
        for title, parts in found.items()
    ]


def method_names(configs: Sequence[Mapping[str, Any]], shared: Sequence[str]) -> list[str]:
    """The method of each cell: the names of its choices that are not the usual ones, or `PLAIN`.

    The usual one of a key is its default if a cell has it, else that of the first cell with this key.
    """
    choices: dict[str, list[str]] = {}
    for key, default in Config().as_keys().items():
        if isinstance(default, str) and key not in shared:
            names = [split_name(str(config[key]))[0] if key in config else "" for config in configs]
            usual = split_name(default)[0]
            usual = usual if usual in names else next(filter(None, names), "")
            choices[key] = ["" if name == usual else name for name in names]
    return [" + ".join(filter(None, names)) or PLAIN for names in zip(*choices.values(), strict=True)]


def label(axes: Sequence[str], coords: Sequence[Value]) -> str:
    """Coordinates as text, for instance ``K = 4, J = 10``; strings such as ``lars`` without their key, but for none."""
    return ", ".join(
        value if isinstance(value, str) and value != "none" else f"{SYMBOLS.get(axis, axis)} = {value}"
        for axis, value in zip(axes, coords, strict=True)
    )


def _tables_of(name: str, folder: Path, runs: pd.DataFrame, records: Records) -> list[ResultTable]:
    """The table of the folder's study and, if it has other runs, one of those; without a study, one of all runs."""
    study = _study_of(folder, records.warnings)
    if study is None:
        return [_inferred_table(About(name, escaped(folder.resolve().name), folder), runs, records)]
    configs = {cell.coords: cell_identity(cell.config.record(cell.mode, own=False)) for cell in study.cells()}
    positions = {_without_budget(config): i for i, config in enumerate(configs.values())}
    found = runs["identity"].map(lambda identity: positions.get(_without_budget(json.loads(identity))))
    described, others = runs[found.notna()].assign(cell=found.dropna().astype(int)), runs[found.isna()]
    older = _of_an_older_budget(described)
    described, others = described[~older], pd.concat([others, described[older].drop(columns="cell")])
    tables = [_table(About(name, study.title, folder), study.axes, configs, described, records, study)]
    if others.empty:
        return tables
    records.warnings.append(
        f"{escaped(folder)}: {len(others)} runs are not part of the study {study.name} "
        f"and are shown separately: {', '.join(others['run'])}"
    )
    title = f"{study.name}: other configurations"
    return [*tables, _inferred_table(About(f"{name}-other", title, folder), others, records)]


def _without_budget(config: Mapping[str, Value]) -> str:
    return json.dumps({name: value for name, value in config.items() if name != BUDGET}, sort_keys=True)


def _of_an_older_budget(runs: pd.DataFrame) -> pd.Series:
    """Whether epochs were met to a round in a run, while they are met to a step in others of its cell."""
    to_a_step = runs["identity"].map(lambda identity: json.loads(identity).get(BUDGET) == "to a step")
    return ~to_a_step & to_a_step.groupby(runs["cell"]).transform("any")


def _inferred_table(about: About, runs: pd.DataFrame, records: Records) -> ResultTable:
    """The runs by the keys in which they differ or, if there are many such keys, by their names without the seed."""
    keys = ["mode", *Config().as_keys(), BUDGET]
    configs = [cell_identity(json.loads(text)) for text in runs["identity"]]
    axes = tuple(key for key in keys if len({str(config[key]) for config in configs if key in config}) > 1)
    if len(axes) > MOST_AXES or "mode" in axes:
        axes = ("run",)
        coords: list[tuple[Value, ...]] = [(re.sub(r"-seed\d+$", "", run),) for run in runs["run"]]
    else:
        coords = [tuple(config.get(axis, NOTHING) for axis in axes) for config in configs]
    found = dict(zip(coords, configs, strict=True))
    order = sorted(found, key=lambda values: [(isinstance(value, str), value) for value in values])
    runs = runs.assign(cell=[order.index(values) for values in coords])
    return _table(about, axes, {values: found[values] for values in order}, runs, records)


def _table(
    about: About,
    axes: tuple[str, ...],
    configs: dict[tuple[Value, ...], dict[str, Value]],
    runs: pd.DataFrame,
    records: Records,
    study: Study | None = None,
) -> ResultTable:
    """The table of the cells with these coordinates and `configs`; `runs` have a column `cell`.

    Without a `study`, a cell is expected to have no more runs than it has.
    """
    compare, seeds = (study.compare, len(study.seeds)) if study else ("", 0)
    cells = pd.DataFrame([_cell(axes, coords, config, compare) for coords, config in configs.items()])
    cells["expected"] = runs["cell"].value_counts().reindex(cells.index, fill_value=0).clip(lower=seeds)
    of_cell = ["clients", "workers", "baseline", "summed"]
    runs = runs.drop(columns=["clients", "workers"], errors="ignore").join(cells[of_cell], on="cell")
    metric = next(iter(runs["metric"]), ACCURACY)
    numbers = [metric.best, metric.final, "epoch", "round", "steps_done", "parameters"]
    types = {**dict.fromkeys([*numbers, *Costs.model_fields], float), "finished": bool}
    runs = runs.astype(types).copy()  # as one block: before, each column is one
    runs["parameters"] = runs["parameters"].fillna(runs.groupby("cell")["parameters"].transform("max"))
    rows = records.rows[records.rows["run"].isin(runs.index)]
    rows = rows.join(runs[["cell", *of_cell, "parameters"]], on="run")
    inferred = "" if axes == ("run",) else compared_axis(axes)
    shown = (study.question, study.compared, study.together) if study else ("", inferred)
    own = (about.name, escaped(about.title), (about.folder,))
    return ResultTable(*own, axes, cells, add_traffic(runs), add_traffic(rows), *shown)


def _cell(axes: tuple[str, ...], coords: tuple[Value, ...], config: dict[str, Any], compare: str) -> dict[str, Any]:
    """The line of `ResultTable.cells` of a cell, without `expected`; `compare` names a table of the paper."""
    baseline = coords[-1:] == (LARGE_BATCH,)
    clients, workers = 1, 1
    if baseline:
        clients = workers = int(coords[0])
    elif config["mode"] == "localsgd":
        clients = int(config["clients"])
        workers = Config(clients=clients, fraction=float(config["fraction"])).clients_per_round
    return {
        "coords": coords,
        "config": config,
        **_names(axes, coords),
        "clients": clients,
        "workers": workers,
        "baseline": baseline,
        "summed": is_summed(config),
        "paper": paper_value(compare, config),
    }


def _names(axes: tuple[str, ...], coords: tuple[Value, ...]) -> dict[str, str]:
    """The coordinates of a cell as text, in the columns of `ResultTable.cells`."""
    across = 1 if len(axes) > 1 else 0
    return {
        "label": label(axes, coords),
        "column": label(axes[:across], coords[:across]),
        "row": label(axes[across:], coords[across:]),
        "tick": " ".join(map(str, coords[across:])),
    }


def paper_value(table: str, config: Mapping[str, Value]) -> PaperValue | None:
    """The value for a cell's configuration in the paper's `table`, from ``studies/paper.csv``, if it has one."""
    with (FOLDER / "paper.csv").open() as file:
        for row in csv.DictReader(file):
            matches = all(row[name] in ("", split_name(str(config.get(name)))[0]) for name in PAPER_KEYS)
            if row["table"] == table and matches:
                return PaperValue(float(row["best"]), float(row["final"]) if row["final"] else None, row["note"])
    return None


def _study_of(folder: Path, warnings: list[str]) -> Study | None:
    """The study that is stored with the runs, or else the study with the name of the folder."""
    stored = folder / STORED
    try:
        if stored.is_file():
            return read_study(str(stored))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        warnings.append(f"{escaped(folder)}: {escaped(error)}; the folder is shown without its study")
        return None
    return read_study(folder.name) if folder.name in study_names() else None


def _without_duplicates(runs: pd.DataFrame, warnings: list[str]) -> pd.DataFrame:
    """One run for each configuration and seed, preferably a finished one."""
    ordered = runs.sort_values("finished", ascending=False, kind="stable")
    first = ordered.drop_duplicates(["identity", "seed"])
    for run in ordered[~ordered.index.isin(first.index)].itertuples():
        same = first[(first["identity"] == run.identity) & (first["seed"] == run.seed)]
        warnings.append(f"{escaped(run.folder)} is the same run as {same['run'].iloc[0]}: it is left out")
    return first.sort_index()


def _warn_of_equal_names(records: Records) -> None:
    """Warn if two runs of the same study and name have different configurations."""
    first: dict[tuple[str, str], Any] = {}
    for run in records.runs.itertuples():
        other = first.setdefault((run.folder.parent.name, run.folder.name), run)
        one, two = json.loads(other.identity), json.loads(run.identity)
        if names := differences(one, two):
            key = names[0]
            records.warnings.append(
                f"{escaped(other.folder)} and {escaped(run.folder)} have one name and different "
                f"configurations ({key} = {one.get(key)} and {two.get(key)}): both are shown"
            )


def _file_name(name: str) -> str:
    """`name` for use in file names, links and options: without special characters, and not too long."""
    plain = re.sub(r"[^\w.+=,-]+", "_", name.encode(errors="replace").decode()).lstrip("-.") or "results"
    return plain.encode()[:LONGEST_NAME].decode(errors="ignore")
