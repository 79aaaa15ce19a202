"""The commands grid and demo: every cell, then the table, the CSV and the plot."""

from __future__ import annotations

import csv
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsim.cli.commands import cli
from fedsim.config.options import GridOptions
from fedsim.errors import RunFailed, UserError
from fedsim.experiments.study import grid_study, read_study
from fedsim.report.load import read_records
from fedsim.report.result_table import read_tables
from fedsim.runs.records import read_rows

SMALL = (
    "grid --dataset synthetic:images=64 --model lenet5 --batch-size 4 --epochs 2 --device cpu --threads 1 --name grid"
)
CELLS = "--clients 1,2 --local-steps 2,4 --seeds 1,2"
Grid = Callable[..., str]


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Grid:
    """Run the command with these options in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["run.py", "grid"])

    def run(options: str = CELLS) -> str:
        cli(f"{SMALL} {options}".split(), standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_a_grid_runs_every_cell_then_its_table_csv_and_plot(grid: Grid, tmp_path: Path) -> None:
    text = grid()
    folder = tmp_path / "results" / "grid"
    names = {f"k{k}-j{j}-seed{seed}" for k in (1, 2) for j in (2, 4) for seed in (1, 2)}
    assert {path.name for path in folder.iterdir() if path.is_dir()} == names
    with (folder / "grid.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["clients"], row["local_steps_per_round"], row["seed"]) for row in table] == [
        (str(k), str(j), str(seed)) for k in (1, 2) for j in (2, 4) for seed in (1, 2)
    ]
    assert all(0 <= float(row["final_test_accuracy"]) <= 1 for row in table)
    assert (folder / "grid.png").read_bytes().startswith(b"\x89PNG")
    cell = [row for row in table if (row["clients"], row["local_steps_per_round"]) == ("2", "4")]
    mean = 100 * statistics.mean(float(row["final_test_accuracy"]) for row in cell)
    (line,) = (line for line in text.splitlines() if line.startswith(" K = 2, J = 4 "))
    assert f"{mean:.2f} ±" in line


def test_finished_cells_are_skipped_and_interrupted_ones_resume(grid: Grid, tmp_path: Path) -> None:
    folder = tmp_path / "results" / "grid"
    cells = "--clients 1,2 --local-steps 2"
    grid(f"{cells} --stop-after-rounds 3")
    assert not read_records(folder).runs["finished"].any()
    grid(cells)
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*/metrics.jsonl")}
    assert len(written) == 2
    assert all(len(read_rows(path.parent)) > 3 for path in written)
    grid(f"{cells} --clients 1,2,4")
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert read_records(folder).runs["finished"].sum() == 3


def test_every_cell_is_checked_before_the_first_begins(grid: Grid, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="clients = 999"):
        grid(f"{CELLS} --clients 1,999")
    assert not (tmp_path / "results").exists()


def test_a_grid_under_a_taken_name_is_refused_before_anything_runs(grid: Grid, tmp_path: Path) -> None:
    grid("--clients 2 --local-steps 4")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="holds a run of another configuration"):
        grid("--clients 1,2 --local-steps 4 --lr 0.5")  # its first cell has a folder to itself
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_of_other_settings_are_not_in_the_table_of_a_grid(grid: Grid, tmp_path: Path) -> None:
    """A table is of one experiment; what else is in the folder is named in one line."""
    folder = tmp_path / "results" / "grid"
    grid("--clients 1 --local-steps 2")
    text = grid("--clients 2 --local-steps 2 --lr 0.5")
    assert (
        f"warning: {folder}: 1 runs are not part of the study grid and are shown separately: k1-j2-seed2025\n" in text
    )
    with (folder / "grid.csv").open() as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["k2-j2-seed2025"]
    text = grid("--clients 1 --local-steps 2,4")
    assert "are shown separately: k2-j2-seed2025\n" in text
    with (folder / "grid.csv").open() as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["k1-j2-seed2025", "k1-j4-seed2025"]


def test_a_grid_is_kept_as_a_study_that_runs_it_again(grid: Grid, tmp_path: Path) -> None:
    grid(
        "--clients 1,2 --local-steps 2,4 --seeds 1 --momentum 0.5 --preset table2 --batchnorm-at-sync average"
    )  # LeNet-5 has no BatchNorm
    (table,), warnings = read_tables(tmp_path / "results" / "grid")
    assert (tuple(table.axes), warnings) == (("clients", "local-steps"), [])
    study = read_study(str(tmp_path / "results" / "grid" / "study.toml"))
    keys = {"momentum": "0.5", "epochs": "2", "threads": "1", "name": "grid"}
    asked = grid_study({"clients": [1, 2], "local-steps": [2, 4], "seed": [1]}, keys, "table2")
    assert [cell.config.name for cell in study.cells()] == [cell.config.name for cell in asked.cells()]
    for cell in study.cells():
        config = cell.config
        assert (config.rounds, config.epochs, config.momentum, config.shuffle_every) == (0, 2.0, 0.5, "round")
        assert (config.dataset, config.batch_size, config.threads) == ("synthetic:images=64", 4, 0)


def test_a_cell_that_fails_is_named_and_the_others_run(grid: Grid, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"2 of 2 cells failed: grid/k1-j2-seed1, grid/k1-j4-seed1"):
        grid("--clients 1 --local-steps 2,4 --seeds 1 --lr 1e9 --momentum 0.99 --epochs 4")
    assert (tmp_path / "results" / "grid" / "grid.csv").exists()


def test_the_default_name_is_made_from_what_all_cells_share() -> None:
    keys = {"batch-size": "16", "lr": "0.1"}
    one, other = (
        grid_study({"clients": [k], "local-steps": [2 * k], "seed": [k]}, {**keys, "threads": str(k)}) for k in (1, 2)
    )
    assert re.fullmatch(r"grid-sgdm-b16-[0-9a-f]{6}", one.name)
    assert one.name == other.name
    assert grid_study({"clients": [1], "local-steps": [2]}, {**keys, "lr": "0.2"}).name != one.name


@pytest.mark.parametrize("listed", ["", "4,", "a", "1.5"])
def test_lists_are_whole_numbers(listed: str) -> None:
    assert GridOptions.of({"clients": "12,4,4"}).clients == (4, 12)
    with pytest.raises(UserError, match="for instance --clients 4,12"):
        GridOptions.of({"clients": listed})


def test_the_demo_needs_no_data() -> None:
    study = read_study("demo")
    assert {(cell.config.dataset, cell.config.model) for cell in study.cells()} == {("synthetic", "lenet5")}
    assert (study.axes, len(study.cells())) == (("clients", "local-steps"), 9)
