"""``fedsim compare``, ``diff``, ``runs``: studies in one table and figure, the keys of two runs, a line for each."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from fedsim.config import ARGUMENTS, BUDGET
from fedsim.errors import UserError
from fedsim.report.answers import answers
from fedsim.report.differences import paired_differences
from fedsim.report.figures import plots_of
from fedsim.report.load import escaped, read_records
from fedsim.report.page import folder, output_folder, save_plot, show_path, show_warnings, write_csv
from fedsim.report.result_table import NOTHING, joined, read_tables
from fedsim.report.tables import TRAFFIC, Entry, TextTable, number, result_table, runs_frame, show_table
from fedsim.runs.folder import CONFIG, ROWS, differences, is_locked, read_config
from fedsim.system.provenance import program

NAME = "comparison"  # of the files
MINUTE = len("2000-01-01T00:00")
TITLES = {BUDGET: "epochs are met"}  # of what no key sets


def compare(folders: Sequence[str], out: str, console: Console) -> None:
    """Print the studies in `folders` as one table with paired differences, and write figures and CSV to `out`."""
    if len(folders) < 2:
        raise UserError("compare needs two folders of results or more: for instance results/A results/B")
    tables = []
    for text in folders:
        found, warnings = read_tables(folder("results", text))
        show_warnings(warnings, console)
        tables += found
    if len(metrics := {table.metric for table in tables}) > 1:
        names = " and ".join(sorted(metric.name for metric in metrics))
        raise UserError(f"the studies are compared by {names}, which are not one measure: compare those of one task")
    together = joined(NAME, " and ".join(table.name for table in tables), tables)
    changes = paired_differences(together)
    show_table(result_table(together, changes, TRAFFIC), console)
    console.print(*answers(together, changes), sep="\n", markup=False, highlight=False)
    command = f"{program()} {shlex.join(['compare', *folders, '-o', out])}"
    with output_folder(out) as path:
        write_csv(runs_frame(together), path / f"{NAME}-runs.csv")
        for make in plots_of(together).values():
            for file in save_plot(make(), path, command):
                show_path(file, console)


def show_differences(one: str, other: str, console: Console) -> None:
    """Print the keys in which the configurations of two runs differ, and both values."""
    if not other:
        raise UserError("diff needs the folders of two runs: for instance results/A/k4-j4-seed1 results/B/k4-j4-seed1")
    first, second = (_flat(_config(folder("run", text))) for text in (one, other))
    names = differences(first, second)
    if BUDGET in names and not (BUDGET in first and BUDGET in second):
        names.remove(BUDGET)  # it says nothing of one of the two, since another key differs
    lines = [
        f"{TITLES.get(name, name)}: {escaped(first.get(name, NOTHING))} | {escaped(second.get(name, NOTHING))}"
        for name in names
    ]
    for line in lines or ["the two runs have the same configuration"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _config(run: Path) -> dict[str, Any]:
    """The configuration of the run in the folder `run`."""
    if not (run / CONFIG).exists():
        raise UserError(f"{escaped(run)} holds no run: give the folder of one, for instance results/A/k4-j4-seed1")
    return read_config(run)


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a run, and every argument of each choice as ``key.argument``."""
    flat = {key: value for key, value in config.items() if key != ARGUMENTS}
    for key, choices in config[ARGUMENTS].items():
        for arguments in choices.values():
            flat |= {f"{key}.{name}": value for name, value in arguments.items()}
    return flat


def show_runs(root: str, console: Console) -> None:
    """Print a line for each run under `root`: its state, when and where it ran, its metric, bytes and time."""
    records = read_records(folder("results", root))
    show_warnings(records.warnings, console)
    if records.runs.empty:
        raise UserError(f"{escaped(root)} holds no runs: give a folder of results, for instance results")
    runs, metrics = records.runs.to_dict("records"), list(dict.fromkeys(records.runs["metric"]))
    lines = [_line(Path(root), run, with_units=len(metrics) > 1) for run in runs]
    unknown = {name for name in ("date", "host") if all(line[name] == NOTHING for line in lines)}  # to old records
    header = [name for name in lines[0] if name not in unknown]
    rows = [[Entry(line[name]) for name in header] for line in lines]
    unit = "" if len(metrics) > 1 else f"Best and final {metrics[0].label}"
    show_table(TextTable(unit, header, rows), console)


def _line(root: Path, run: dict[str, Any], with_units: bool) -> dict[str, str]:
    """The fields of a run in the list of runs, by their titles."""
    metric, place, rows = run["metric"], run["folder"], run["folder"] / ROWS
    state = "finished" if run["finished"] else "running" if is_locked(place) else "unfinished"
    date = run["date"] or ""
    if not run["finished"] and rows.exists():
        date = datetime.fromtimestamp(rows.stat().st_mtime).isoformat()
    sent = [run[f"bytes_{way}"] for way in ("up", "down")]
    tests = {title: run.get(name) for title, name in (("best", metric.best), ("final", metric.final))}
    numbers = {title: NOTHING if value is None else metric.number(value) for title, value in tests.items()}
    if with_units:
        numbers = {title: text if text == NOTHING else metric.with_unit(text) for title, text in numbers.items()}
    return {
        "cell": escaped(place.relative_to(root)),
        "state": state,
        "date": escaped(date[:MINUTE].replace("T", " ") or NOTHING),
        "host": escaped(run["host"] or NOTHING),
        "device": escaped((run["device"] or NOTHING).split(" ")[0]),
        **numbers,
        "MB sent": number(sum(sent) / 1e6) if None not in sent else NOTHING,
        "minutes": number(run["seconds"] / 60) if run["seconds"] is not None else NOTHING,
    }
