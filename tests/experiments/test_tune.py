"""Tuning: each cell's keys are chosen on held-out training images, then run with every seed and tested."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsim.errors import RunFailed, UserError
from fedsim.experiments.study import Study, read_study
from fedsim.experiments.sweep import OneByOne
from fedsim.experiments.tune import at_end, run_tuned_studies, trials_of, with_stored_choice
from fedsim.report.result_table import read_tables
from fedsim.report.tables import notes
from fedsim.runs.folder import read_config
from fedsim.runs.records import read_rows, read_summary

TUNED = """title = "Tuned"
mode = "localsgd"
twins = true
[grid]
clients = [1, 2]
local-steps = [3]  # a round does not end with the epoch
seed = [1]
[set]
dataset = "synthetic:classes=2,images=320"
model = "lenet5"
batch-size = 8
epochs = 5.0
weight-decay = 0.0
warmup-epochs = 0.5
device = "cpu"
threads = 1
[tune]
validation = 64
seed = 7
budget = 0.8
stop-below = 0.7
grid = { lr = [1e-9, 0.05, 1e9] }
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tuned.toml"
    path.write_text(TUNED)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the study with one cell, two trials and one epoch of 72 images, and of its results."""
    path = tmp_path_factory.mktemp("finished") / "tuned.toml"
    text = TUNED.replace("[1, 2]", "[1]").replace("twins = true", "").replace("[1e-9, 0.05, 1e9]", "[0.05, 1e9]")
    path.write_text(text.replace("epochs = 5.0", "epochs = 1.0").replace("= 320", "= 136").replace("budget = 0.8", ""))
    run(path)
    return path.parent


@pytest.fixture
def small_study(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "tuned.toml"


def run(path: Path, cells: str = "") -> str:
    """Tune and run the study in `path`; returns what it printed."""

    def cells_of(study: Study) -> Any:
        return [cell for cell in study.cells() if cell.name.startswith(cells)]

    console = Console(width=200, file=(text := io.StringIO()))
    studies = [read_study(str(path))]
    failed, _ = run_tuned_studies(studies, cells_of, path.parent / "results", OneByOne("local"), False, console)
    assert failed == []
    return text.getvalue()


def trials(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (folder / "tuning.csv").open() as file:
        return {(line["cell"], line["lr"]): line for line in csv.DictReader(file)}


def test_each_cell_and_baseline_runs_with_the_rate_chosen_for_it_alone(path: Path) -> None:
    text = run(path, "k2-j3")
    folder = path.parent / "results" / "tuned"
    first = trials(folder)
    assert {key: line["outcome"] for key, line in first.items()} == {
        ("k2-j3", "1e-09"): "stopped early",  # at chance, of two classes
        ("k2-j3", "0.05"): "chosen",
        ("k2-j3", "1000000000.0"): "failed",
    }
    trial = path.parent / "results" / "tuned-tuning" / "k2-j3-lr0.05"
    config, summary = read_config(trial), read_summary(trial) or {}
    assert (config["seed"], config["validation"], config["epochs"], config["warmup-epochs"]) == (7, 64, 4.0, 0.4)
    assert {row["tested_on"] for row in read_rows(trial)} == {"validation"}
    assert len(read_rows(trial.with_name("k2-j3-lr1e-09"))) == 1  # of four
    first_stage, _, last_stage = (line for line in text.splitlines() if " of each trial" in line)
    assert (first_stage, last_stage) == ("tuned: to 25% of each trial, 3 left", "tuned: to 100% of each trial, 1 left")
    counts = "of 3 tried, 1 stopped early, 1 failed"
    assert f"k2-j3: lr = 0.05 (validation {summary['final_test_accuracy']:.2%}; {counts})" in text.splitlines()

    # Another cell later: those that are finished are not run again, and what was chosen for them is the same
    before = {file: file.stat().st_mtime_ns for file in (trial / "summary.json", folder / "k2-j3-seed1/summary.json")}
    run(path, "k2")
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert first.items() <= trials(folder).items()
    assert read_study(str(folder / "study.toml")).chosen == {"k2-j3": {"lr": 0.05}, "k2-twin": {"lr": 0.05}}
    for name in ("k2-j3-seed1", "k2-twin-seed1"):
        config, summary = read_config(folder / name), read_summary(folder / name) or {}
        assert (config["lr"], config["validation"], config["epochs"]) == (0.05, 0, 5.0)
        assert summary["tested_on"] == "test"
    run(path, "k2-twin")
    assert read_study(str(folder / "study.toml")).chosen.keys() == {"k2-j3", "k2-twin"}
    (table, of_trials), warnings = read_tables(path.parent / "results")  # the tuned cells are the study's
    assert (table.title, len(table.runs), of_trials.name, warnings) == ("Tuned", 2, "tuned-tuning", [])
    (text,) = (note for note in notes(table) if note.startswith("Tuning: "))
    assert "lr of 1e-09, 0.05, 1000000000.0; seed 7, 80% of the budget" in text
    assert all(f"{cell}: lr = 0.05 (" in text for cell in ("k2-j3", "k2-twin"))
    assert not any("Tuning" in note for note in notes(of_trials))
    assert any("tested on the test images, keys were chosen on held-out training" in note for note in notes(table))
    (folder / "tuning.csv").write_text("cell,outcome\nk2-j3,chosen\n")
    assert any(note.endswith("tuned/tuning.csv cannot be read.") for note in notes(table))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("0.05, 1e9]", "0.1]", "tuned: {folder} holds runs that were not tuned by this [tune]: give another --results"),
        ("seed = 7", "seed = 8", "tuned: {folder} holds runs that were not tuned by this [tune]"),
        ("batch-size = 8", "batch-size = 16", "holds a run of another configuration (batch-size = 8, not 16)"),
    ],
)
def test_a_study_that_does_not_fit_its_results_is_refused_before_any_trial(
    small_study: Path, before: str, after: str, words: str
) -> None:
    kept = contents(results := small_study.parent / "results")
    small_study.write_text(small_study.read_text().replace(before, after))
    with pytest.raises(UserError) as caught:
        run(small_study)
    assert words.format(folder=results / "tuned") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(results) == kept


def test_trials_of_another_configuration_are_refused_and_those_of_the_same_are_used_again(small_study: Path) -> None:
    shutil.rmtree((results := small_study.parent / "results") / "tuned")
    kept, text = contents(results), small_study.read_text()
    small_study.write_text(text.replace("seed = 7", "seed = 8"))
    with pytest.raises(UserError, match=r"tuned-tuning/k1-j3-lr0.05 holds a run of another .*seed = 7, not 8"):
        run(small_study)
    assert contents(results) == kept
    small_study.write_text(text)
    run(small_study)
    assert kept.items() <= contents(results).items()


def test_a_cell_that_the_study_has_no_more_is_forgotten(path: Path) -> None:
    study = read_study(str(path))
    folder = path.parent / "results" / "tuned"
    folder.mkdir(parents=True)
    (folder / "study.toml").write_text(
        study.with_settings({}, chosen={"k1-j3": {"lr": 0.5}, "k2-j3": {"lr": 0.1}}).toml
    )
    path.write_text(TUNED.replace("[1, 2]", "[2]"))
    assert with_stored_choice(read_study(str(path)), path.parent / "results").chosen == {"k2-j3": {"lr": 0.1}}


def test_where_no_trial_ends_the_study_does_not_run(path: Path) -> None:
    path.write_text(TUNED.replace("[1e-9, 0.05, 1e9]", "[1e8, 1e9]"))
    with pytest.raises(RunFailed, match="tune: no trial of k1-j3, k1-twin came to its end: give smaller rates"):
        run(path, "k1")
    assert not (path.parent / "results" / "tuned").exists()


def test_a_number_at_the_end_of_its_list_is_known(path: Path) -> None:
    tune = read_study(str(path)).tune
    assert tune is not None
    assert [at_end({"lr": lr}, tune) for lr in tune.grid["lr"]] == [["lr"], [], ["lr"]]


def test_a_budget_in_rounds_is_cut_too_and_other_keys_are_crossed(path: Path) -> None:
    text = TUNED.replace("epochs = 5.0", 'rounds = 160\nschedule = "multistep:milestones=2.5/4"')
    path.write_text(text.replace("lr = [1e-9, 0.05, 1e9]", 'lr = [0.1], outer = ["none", "slowmo"]'))
    study = read_study(str(path))
    found = {trial.cell.config.name: trial.cell.config for trial in trials_of(study, study.cells())}
    assert {name for name in found if name.startswith("k2")} == {
        "k2-j3-lr0.1-outernone",
        "k2-j3-lr0.1-outerslowmo",
        "k2-twin-lr0.1",  # outer is no key of one machine
    }
    config = found["k2-j3-lr0.1-outerslowmo"]
    assert (config.rounds, config.schedule, config.outer) == (128, "multistep:milestones=2/3.2", "slowmo")


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("validation = 64", "", "tune validation is missing"),
        ("validation = 64", "validation = 0", "tune validation = 0: Input should be greater than or equal to 1"),
        ("budget = 0.8", "budget = 0", "tune budget = 0: Input should be greater than 0"),
        ("budget = 0.8", "bugdet = 0.5", "tune bugdet is unknown"),
        ("lr = [1e-9, 0.05, 1e9]", "", "tune grid is empty: give a key with its values, for instance lr = [0.01, 0.1]"),
        ("lr = [1e-9, 0.05, 1e9]", "lrr = [1.0]", "unknown key lrr: did you mean lr?"),
        ("lr = [1e-9, 0.05, 1e9]", "lr = [-1.0]", "lr = -1.0 is out of range"),
        ("lr = [1e-9, 0.05, 1e9]", "clients = [1]", "tune grid clients: it is a key of the study's own grid"),
        ("lr = [1e-9, 0.05, 1e9]", "epochs = [1.0]", "tune grid epochs: it cannot be chosen by accuracy: leave it out"),
        ("warmup-epochs", "validation = 5\nwarmup-epochs", "tune: the study sets validation itself: leave it out"),
        ("[tune]", "[chosen]\nk9-j1 = {lr = 0.1}\n[tune]", "chosen k9-j1: the study has no such cell"),
    ],
)
def test_bad_input_is_one_line(path: Path, before: str, after: str, words: str) -> None:
    path.write_text(TUNED.replace(before, after))
    with pytest.raises(UserError) as caught:
        read_study(str(path))
    assert str(caught.value).startswith(f"tuned.toml: {words}")
    assert "\n" not in str(caught.value)
