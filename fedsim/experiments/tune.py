"""Tune a study: choose keys for each cell by trials, which see no test image, before it is run with every seed.

A study's ``[tune]`` lists the values to try. A trial trains a cell with some of them for a part of its budget, with one
seed, and is tested on training examples held out for this. The values with the best metric at the end of their trial
are chosen; of equal ones, the first. All cells, the large-batch baselines too, have the same values, images, seed and
budget. After a quarter and after half of its budget, a trial is stopped if its best accuracy so far is less than
``stop-below`` times that of its cell's best trial (of a metric that is to be low: if it is more than the best divided
by ``stop-below``). This depends only on the rows up to that point, so that the same trials are stopped in any order and
on any number of machines. The chosen keys are stored in the study's ``study.toml``, all trials in its ``tuning.csv``,
and their runs in ``RESULTS/STUDY-tuning``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fedsim.config import Value, has_key
from fedsim.data.datasets import task_of
from fedsim.data.metric import Metric, metric_of
from fedsim.errors import RunFailed, UserError
from fedsim.experiments.progress import ends_after
from fedsim.experiments.study import PLAIN_CELL, STORED, TRIALS, TUNING, Cell, Study, Tune, read_study
from fedsim.experiments.sweep import (
    PLAIN,
    Runner,
    check_folders,
    checked_cells,
    full_name,
    resolved_cell,
    run_cells,
    run_studies,
)
from fedsim.optim.lr_schedule import shape_of
from fedsim.runs.folder import CONFIG, writable
from fedsim.runs.records import read_rows, read_summary
from fedsim.system.files import atomic_write
from fedsim.training.local_steps import local_steps_schedule

STAGES = (0.25, 0.5)  # parts of a trial, after which hopeless ones are stopped


@dataclass
class Trial:
    """A run that tries `keys` for the cells of the study that are named `of`, whatever their seed.

    `outcome`: chosen, tried, stopped early or failed; empty until it is known.
    """

    of: str
    keys: dict[str, Value]
    cell: Cell
    outcome: str = ""


def run_tuned_studies(
    studies: Sequence[Study],
    cells_of: Callable[[Study], list[Cell]],
    results: Path,
    runner: Runner,
    rerun: bool,
    console: Console,
) -> tuple[list[str], int]:
    """Tune the `studies` that have ``[tune]``, then run the cells that `cells_of` selects, in `results` (absolute).

    Returns the names of the cells that failed, and the number of cells.
    """
    if any(study.tune for study in studies):
        _check_before_trials(studies, cells_of, results, runner)
    tuned = [tune(study, cells_of(study), results, runner, rerun, console) for study in studies]
    selected = [(study, cells_of(study)) for study in tuned]
    return run_studies(selected, results, runner, rerun, console), sum(len(cells) for _, cells in selected)


def _check_before_trials(
    studies: Sequence[Study], cells_of: Callable[[Study], list[Cell]], results: Path, runner: Runner
) -> None:
    """Raise UserError if cells or trials of `studies` do not fit what `results` holds, before any trial is run."""
    held = [with_stored_choice(study, results) for study in studies]
    checked_cells([(study, cells_of(study)) for study in held], results, runner)
    for study in held:
        trials = resolved_trials(study, cells_of(study), results, runner)
        check_folders([trial.cell for trial in trials], results)


def with_stored_choice(study: Study, results: Path) -> Study:
    """`study` with the keys that its ``[tune]`` chose before, as they are stored in `results`.

    Raises UserError if the runs in the study's folder were not tuned by this ``[tune]``: its choice would not fit them.
    """
    folder = results / study.name
    if study.tune is None or not (folder / STORED).exists():
        return study
    held = read_study(str(folder / STORED))
    if held.tune == study.tune:
        names = {cell.name for cell in study.cells()}
        return study.model_copy(update={"chosen": {name: held.chosen[name] for name in held.chosen if name in names}})
    if any(folder.glob(f"*/{CONFIG}")):
        raise UserError(
            f"{study.name}: {folder} holds runs that were not tuned by this [tune]: "
            "give another --results-dir, or remove that folder to choose again"
        )
    return study


def tune(study: Study, cells: Sequence[Cell], results: Path, runner: Runner, rerun: bool, console: Console) -> Study:
    """`study` with the keys chosen for `cells`, or unchanged without ``[tune]``. Raises RunFailed if no trial ended."""
    if study.tune is None:
        return study
    trials = resolved_trials(study, cells, results, runner)
    what = _metric(trials[0]).examples if trials else "examples"
    console.print(f"{study.name}: {len(trials)} trials on {study.tune.validation} held-out training {what}", **PLAIN)
    with runner.started([trial.cell for trial in trials]):
        for part in (*STAGES, 1.0):
            running = [trial for trial in trials if not trial.outcome]
            console.print(f"{study.name}: to {part:.0%} of each trial, {len(running)} left", **PLAIN)
            failed = run_cells([_up_to(part, trial.cell) for trial in running], runner, rerun, console)
            rerun = False
            for trial in running:
                trial.outcome = _judged(trial, running, failed, part, study.tune)
    _choose(trials)
    chosen = {trial.of: trial.keys for trial in trials if trial.outcome == "chosen"}
    for name in dict.fromkeys(trial.of for trial in trials):
        console.print(_summary(name, [trial for trial in trials if trial.of == name], study.tune), **PLAIN)
    with writable(results):
        return _stored(study, chosen, trials, results)


def resolved_trials(study: Study, cells: Sequence[Cell], results: Path, runner: Runner) -> list[Trial]:
    """The trials for `cells`, with their cells resolved; raises UserError if one cannot run."""
    trials = trials_of(study, cells)
    for trial in trials:
        trial.cell = resolved_cell(trial.cell, results / f"{study.name}{TUNING}", runner)
    return trials


def trials_of(study: Study, cells: Sequence[Cell]) -> list[Trial]:
    """The trials for `cells` of `study`: one for each combination of values, whatever the number of seeds.

    Without ``[tune]`` there are none.
    """
    if study.tune is None:
        return []
    tune, trials = study.tune, []
    first = {cell.name: cell for cell in reversed(cells)}  # `cells` have the keys of this machine
    for cell in study.model_copy(update={"chosen": {}}).cells([tune.seed]):
        if cell.name not in first:
            continue
        machine = {key: first[cell.name].config.as_keys()[key] for key in ("data-dir", "device", "threads")}
        keys = [name for name in tune.grid if has_key(cell.mode, name.partition(".")[0].replace("-", "_"))]
        for values in itertools.product(*(tune.grid[name] for name in keys)):
            own = dict(zip(keys, values, strict=True))
            name = "-".join([*([cell.name] if cell.name else []), *(f"{key}{value}" for key, value in own.items())])
            tested = {"validation": tune.validation, "record-by": "epoch", "evaluate-every": 1}
            changes = {**_shortened(cell, tune.budget), **machine, **own, **tested, "name": name}
            trials.append(Trial(cell.name, own, cell._replace(config=cell.config.changed(changes))))
    return trials


def _shortened(cell: Cell, budget: float) -> dict[str, Any]:
    """The keys that shorten the run of `cell` to the part `budget`: its length, and the epochs of its schedules."""
    config = cell.config
    epochs = max(1, round(budget * config.epochs)) if cell.mode == "centralized" else budget * config.epochs
    part = epochs / config.epochs
    rounds = max(1, round(budget * config.rounds)) if config.rounds else 0
    schedules = {
        "schedule": shape_of(config).of_part(part),
        "local-steps-schedule": local_steps_schedule(config).of_part(part),
    }
    return {"epochs": epochs, "rounds": rounds, "warmup-epochs": part * config.warmup_epochs, **schedules}


def _up_to(part: float, cell: Cell) -> Cell:
    """`cell`, to be stopped after this part of its run, rounded down to whole epochs."""
    return cell._replace(config=cell.config.changed({"stop-after-epochs": _epochs(part, cell) if part < 1 else 0.0}))


def _epochs(part: float, cell: Cell) -> float:
    return float(max(1, math.floor(part * ends_after(cell.config, cell.mode)[1])))


def _judged(trial: Trial, running: Sequence[Trial], failed: Sequence[str], part: float, tune: Tune) -> str:
    """The outcome of `trial` if it failed, or is hopeless compared with the trials `running` for its cell, or ""."""
    if full_name(trial.cell) in failed:
        return "failed"
    own, metric = _best(trial, part), _metric(trial)
    others = [best for other in running if other.of == trial.of and (best := _best(other, part)) is not None]
    best = metric.best_of(others)
    if part == 1 or own is None or best is None or not tune.stop_below:
        return ""
    return "" if metric.reaches(own, metric.near(best, tune.stop_below)) else "stopped early"


def _best(trial: Trial, part: float) -> float | None:
    """The best value in the first part of a trial, even if it has trained on since; None before the first test."""
    tests = []
    for row in read_rows(trial.cell.folder):
        tests.append(row[metric_of(row).column])
        if row["epoch"] >= _epochs(part, trial.cell):  # a round may end after the epoch
            break
    return _metric(trial).best_of([value for value in tests if value is not None])


def _metric(trial: Trial) -> Metric:
    """What trials are compared by."""
    return task_of(trial.cell.config).metric


def _final(trial: Trial) -> float:
    """The value of the metric at the end of a trial that came to its end."""
    summary = read_summary(trial.cell.folder) or {}
    return float(summary[_metric(trial).final])


def _choose(trials: Sequence[Trial]) -> None:
    """Set the outcomes of the trials that ended; raises RunFailed if every trial of a cell failed or was stopped."""
    ended: dict[str, list[Trial]] = {trial.of: [] for trial in trials}
    for trial in trials:
        if not trial.outcome:
            ended[trial.of].append(trial)
    if without := [name for name, own in ended.items() if not own]:
        raise RunFailed(f"tune: no trial of {', '.join(without)} came to its end: give smaller rates in tune grid")
    for own in ended.values():
        choose = max if _metric(own[0]).higher_is_better else min
        best = choose(own, key=_final)  # the first of equal ones
        for trial in own:
            trial.outcome = "chosen" if trial is best else "tried"


def _summary(name: str, trials: Sequence[Trial], tune: Tune) -> str:
    """A line on what was chosen for the cell `name`, and whether a value beyond those tried may be better."""
    (chosen,) = (trial for trial in trials if trial.outcome == "chosen")
    keys = ", ".join(f"{key} = {value}" for key, value in chosen.keys.items()) or "nothing to choose"
    counts = [(what, sum(trial.outcome == what for trial in trials)) for what in ("stopped early", "failed")]
    others = "".join(f", {count} {what}" for what, count in counts if count)
    beyond = "".join(f"; {key} = {chosen.keys[key]} is at the end of its list" for key in at_end(chosen.keys, tune))
    told = f"validation {_metric(chosen).told(_final(chosen))}; of {len(trials)} tried{others}"
    return f"{name or PLAIN_CELL}: {keys} ({told}){beyond}"


def at_end(keys: dict[str, Value], tune: Tune) -> list[str]:
    """The chosen `keys` whose value is the smallest or largest number tried: a better one may lie beyond."""
    ends = {}
    for key in keys:
        numbers = [value for value in tune.grid[key] if isinstance(value, int | float) and not isinstance(value, bool)]
        ends[key] = (min(numbers), max(numbers)) if len(numbers) > 1 else ()
    return [key for key, value in keys.items() if value in ends[key]]


def _stored(study: Study, chosen: dict[str, dict[str, Value]], trials: Sequence[Trial], results: Path) -> Study:
    """Write `trials` to tuning.csv and the `chosen` keys to study.toml, in `results`; returns the study with them.

    What was chosen for other cells before, by the same ``[tune]``, is kept.
    """
    import pandas as pd  # slow to import, and most studies are not tuned

    folder = results / study.name
    folder.mkdir(parents=True, exist_ok=True)
    lines = pd.DataFrame(map(_line, trials), dtype=object)  # as they are: whole numbers with gaps are not floats
    chosen = {**with_stored_choice(study, results).chosen, **chosen}
    if (folder / TRIALS).exists():
        held = pd.read_csv(folder / TRIALS, dtype=str, keep_default_na=False)
        lines = pd.concat([held[held["cell"].isin(chosen.keys() - {trial.of for trial in trials})], lines])
    tuned = study.model_copy(update={"chosen": chosen})
    for name, text in ((TRIALS, lines.to_csv(index=False, lineterminator="\n")), (STORED, tuned.toml)):
        with atomic_write(folder / name) as file:
            file.write(text.encode())
    return tuned


def _line(trial: Trial) -> dict[str, Any]:
    metric = _metric(trial)
    rows = [row for row in read_rows(trial.cell.folder) if row[metric.column] is not None]
    last = rows[-1] if rows else {"epoch": 0.0, metric.column: ""}
    reached = {"epochs": last["epoch"], f"validation_{metric.name}": last[metric.column]}
    return {"cell": trial.of, **trial.keys, **reached, "outcome": trial.outcome}
