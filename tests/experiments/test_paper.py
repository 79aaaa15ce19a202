from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsim.config import Config
from fedsim.errors import RunFailed, UserError
from fedsim.experiments.cells import cost
from fedsim.experiments.paper import list_studies, run_studies
from fedsim.experiments.study import read_study, study_names
from fedsim.records import read_summary
from fedsim.report.result_table import ResultTable, read_tables

TINY = """title = "Tiny"
mode = "localsgd"
twins = true
[grid]
clients = [1, 2]
local-steps = [2]
seed = [1, 2]
[set]
dataset = "synthetic"
synthetic-images = 128
model = "lenet5"
batch-size = 16
epochs = 2.0
"""
HERE = {"device": "cpu", "threads": 1}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def finished_runs(table: ResultTable) -> list[int]:
    """How many runs of each cell are finished."""
    cells: list[int] = [int(table.runs["finished"][table.runs["cell"] == cell].sum()) for cell in table.cells.index]
    return cells


def run(study: Path, seeds: list[int] | None = None, **keys: Any) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    run_studies([str(study)], seeds or [], {**HERE, **keys}, study.parent / "results", "fleet", False, console)
    return console.export_text()


def test_a_study_runs_every_cell_and_twin_in_its_folder_and_shows_its_table(tiny: Path) -> None:
    text = run(tiny)
    folder = tiny.parent / "results" / "tiny"
    names = {f"k{k}-{what}-seed{seed}" for k in (1, 2) for what in ("j2", "twin") for seed in (1, 2)}
    assert {path.name for path in folder.iterdir()} == names | {"study.toml"}
    assert all((summary := read_summary(folder / name)) and summary["finished"] for name in names)
    assert (folder / "study.toml").read_text() == TINY
    assert "large batch" in text
    (table,), warnings = read_tables(folder)
    assert (table.title, warnings) == ("Tiny", [])
    assert finished_runs(table) == [2, 2, 2, 2]


def test_chosen_cells_run_alone_and_one_that_is_not_there_is_named(tiny: Path) -> None:
    console, folder = Console(file=io.StringIO()), tiny.parent / "results"
    with pytest.raises(UserError, match=r"cells = 'k3' fits no cell of tiny: it has k1-j2, k2-j2, k1-twin, k2-twin"):
        run_studies([str(tiny)], [], HERE, folder, "fleet", False, console, only=["k1-*", "k3"])
    assert not folder.exists()
    run_studies([str(tiny)], [], HERE, folder, "fleet", False, console, only=["k2-j2"])
    assert {path.name for path in (folder / "tiny").iterdir()} == {"k2-j2-seed1", "k2-j2-seed2", "study.toml"}
    run_studies([str(tiny)], [1], HERE, folder, "fleet", False, console, only=["k1-*"])
    assert {path.name for path in (folder / "tiny").glob("k1-*")} == {"k1-j2-seed1", "k1-twin-seed1"}


def test_a_study_in_another_precision_is_a_study_apart(tiny: Path) -> None:
    run(tiny, [1])
    console = Console(record=True, width=200, file=io.StringIO())
    run_studies([str(tiny)], [1], HERE, tiny.parent / "results", "fleet", False, console, precision="bf16")
    tables, warnings = read_tables(tiny.parent / "results")
    assert [(table.name, table.title) for table in tables] == [("tiny", "Tiny"), ("tiny-bf16", "Tiny, in bf16")]
    assert warnings == []
    for table, precision in zip(tables, ("fp32", "bf16"), strict=True):
        assert set(table.runs["precision"]) == {precision}
        assert finished_runs(table) == [1] * 4


@pytest.mark.parametrize(
    ("study", "error"),
    [
        (TINY.replace("[set]", '[set]\nprecision = "fp64"'), "tiny: the study says in which precision it runs"),
        (TINY.replace("seed = [1, 2]", 'precision = ["fp32"]'), "tiny: the study says in which precision it runs"),
    ],
)
def test_a_study_that_says_its_precision_keeps_it(tiny: Path, study: str, error: str) -> None:
    tiny.write_text(study.replace("twins = true\n", ""))
    with pytest.raises(UserError, match=error):
        read_study(str(tiny)).in_precision("bf16")


def test_an_unknown_precision_of_a_study_is_named(tiny: Path) -> None:
    with pytest.raises(UserError, match="precision = 'half' is out of range"):
        read_study(str(tiny)).in_precision("half")


def test_every_study_that_leaves_its_precision_open_can_be_run_in_bf16() -> None:
    for study in map(read_study, study_names()):
        if "precision" not in study.grid:
            cells = study.in_precision("bf16").cells()
            assert [cell.config.precision for cell in cells] == ["bf16"] * len(cells)
            assert [cell.config.changed({"precision": "fp32"}) for cell in cells] == [c.config for c in study.cells()]


def test_broken_off_studies_go_on_and_finished_cells_are_skipped(tiny: Path) -> None:
    folder = tiny.parent / "results" / "tiny"
    run(tiny, [1], **{"stop-after-epochs": 1.0})
    (table,), _ = read_tables(folder)
    assert finished_runs(table) == [0] * 4
    run(tiny, [1])
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*/metrics.jsonl")}
    assert len(written) == 4
    run(tiny, [1, 3])
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    (table,), _ = read_tables(folder)
    assert finished_runs(table) == [2] * 4


def test_everything_is_checked_before_the_first_run(tiny: Path) -> None:
    tiny.write_text(TINY.replace("clients = [1, 2]", "clients = [1, 999]"))
    with pytest.raises(UserError, match="clients = 999"):
        run(tiny)
    assert not (tiny.parent / "results").exists()


def test_cells_that_fail_are_named_and_the_others_run(tiny: Path) -> None:
    tiny.write_text(
        TINY.replace(
            "[set]", "[[case]]\nwhen = {clients = [2]}\nset = {lr = 1e9, momentum = 0.99, epochs = 6.0}\n[set]"
        )
    )
    with pytest.raises(RunFailed, match="2 of 4 cells failed: tiny/k2-j2-seed1, tiny/k2-twin-seed1"):
        run(tiny, [1])
    (table,), _ = read_tables(tiny.parent / "results" / "tiny")
    assert finished_runs(table) == [1, 0, 1, 0]


def test_the_list_says_what_each_study_costs() -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    list_studies([], console)
    lines = {
        line.split("│")[1].strip(): line.split("│")[3:-1] for line in console.export_text().splitlines() if "│" in line
    }
    assert sorted(lines) == study_names()
    # 18 cells, 3 seeds, 100 epochs of 50,000 images; at 1,000 images a second 75 hours
    assert [part.strip() for part in lines["table1"]] == ["18", "3", "270.00", "0.35", "0.00", "75.0"]


def test_the_cost_of_a_run_by_hand() -> None:
    table2 = Config(clients=4, local_steps=10, rounds=200)
    assert cost(table2, "localsgd") == (200 * 10 * 4 * 64, 2000, 200)
    assert cost(Config(batch_size=256, epochs=2.0), "centralized") == (100_000, 2 * 196, 0)
    assert cost(Config(batch_size=256, epochs=2.0, validation=5000), "centralized") == (90_000, 2 * 176, 0)
