from __future__ import annotations

import csv
import io
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsim.errors import RunFailed, UserError
from fedsim.experiments.grid import DEMO_GRID, DEMO_KEYS, Grid, integers, run_grid
from fedsim.experiments.presets import configure
from fedsim.records import read_rows
from fedsim.report.load import read_records
from tests.conftest import SMALL

CELLS = Grid(clients=[1, 2], local_steps=[2, 4], seeds=[1, 2])


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    shared = {name: value for name, value in SMALL.items() if name not in ("clients", "local-steps")}
    return {**shared, "synthetic-images": 256, "results-dir": str(tmp_path), "name": "grid"}


def run(keys: dict[str, Any], grid: Grid = CELLS) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    run_grid(grid, keys, "", "fleet", False, console)
    return console.export_text()


def test_a_grid_runs_every_cell_then_its_table_csv_and_plot(keys: dict[str, Any], tmp_path: Path) -> None:
    text = run(keys)
    folder = tmp_path / "grid"
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
    (line,) = (line for line in text.splitlines() if re.match(r"│\s+4 │", line))  # J down, K across
    assert f"{mean:.2f} ±" in line.split("│")[3]


def test_finished_cells_are_skipped_and_broken_off_ones_go_on(keys: dict[str, Any], tmp_path: Path) -> None:
    run({**keys, "stop-after-rounds": 3})
    assert not read_records(tmp_path / "grid").runs["finished"].any()
    run(keys)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "grid").glob("*/metrics.jsonl")}
    assert len(written) == 8
    assert all(len(read_rows(path.parent)) > 3 for path in written)
    run(keys, CELLS._replace(clients=[1, 2, 4]))
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert read_records(tmp_path / "grid").runs["finished"].sum() == 12


def test_every_cell_is_checked_before_the_first_begins(keys: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="clients = 999"):
        run(keys, CELLS._replace(clients=[1, 999]))
    assert not (tmp_path / "grid").exists()


def test_a_grid_under_a_taken_name_is_refused(keys: dict[str, Any]) -> None:
    run(keys)
    with pytest.raises(UserError, match="holds a run of another configuration"):
        run({**keys, "lr": 0.5})


def test_a_cell_that_fails_is_named_and_the_others_run(keys: dict[str, Any], tmp_path: Path) -> None:
    diverging = {**keys, "lr": 1e9, "momentum": 0.99, "epochs": 4.0}
    with pytest.raises(RunFailed, match=r"2 of 2 cells failed: k1-j2-seed1, k1-j4-seed1"):
        run(diverging, Grid([1], [2, 4], [1]))
    assert (tmp_path / "grid" / "grid.csv").exists()


def test_the_default_name_is_shared_by_all_that_is_not_a_cells_own(keys: dict[str, Any], tmp_path: Path) -> None:
    run({**keys, "name": ""}, Grid([1], [2], [1]))
    run({**keys, "name": ""}, Grid([2], [4], [2]))
    (folder,) = tmp_path.iterdir()
    assert re.fullmatch(r"grid-sgdm-b16-[0-9a-f]{6}", folder.name)


@pytest.mark.parametrize("listed", ["", "4,", "a", "1.5"])
def test_lists_are_whole_numbers(listed: str) -> None:
    assert integers("clients", "12,4,4") == [4, 12]
    with pytest.raises(UserError, match="for instance --clients 4,12"):
        integers("clients", listed)


def test_the_demo_needs_no_data_and_no_gpu() -> None:
    config = configure(DEMO_KEYS)
    assert (config.dataset, config.model) == ("synthetic", "lenet5")
    assert len(DEMO_GRID.clients) * len(DEMO_GRID.local_steps) == 9
