from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedsim.config import BUDGET, Config
from fedsim.experiments.study import LARGE_BATCH, read_study, study_names
from fedsim.report.result_table import PaperValue, ResultTable, label, paper_value, read_tables
from tests.conftest import write_run


def only(root: Path) -> tuple[ResultTable, list[str]]:
    (table,), warnings = read_tables(root)
    return table, warnings


def runs_by_cell(table: ResultTable) -> dict[tuple[object, ...], int]:
    counts = table.runs["cell"].value_counts().reindex(table.cells.index, fill_value=0)
    return dict(zip(table.cells["coords"], counts, strict=True))


def test_a_half_finished_study_keeps_the_cells_that_are_missing(study: Path) -> None:
    table, warnings = only(study.parent)
    assert warnings == []
    assert (table.name, table.title, table.axes) == ("mine", "A study of the tests", ("clients", "local-steps"))
    assert runs_by_cell(table) == {(2, 1): 2, (2, 8): 2, (4, 1): 1, (4, 8): 1, (2, LARGE_BATCH): 2, (4, LARGE_BATCH): 0}
    assert list(table.cells["expected"]) == [2] * 6
    assert list(table.cells["workers"]) == [2, 2, 4, 4, 2, 4]
    assert list(table.cells["baseline"]) == [False] * 4 + [True] * 2
    assert sorted(table.counted["run"]) == sorted(set(table.runs["run"]))
    assert table.runs["finished"].sum() == 7


def test_an_unfinished_run_counts_only_where_nothing_is_finished(study: Path) -> None:
    (study / "k2-j1-seed1" / "summary.json").unlink()
    counted = set(only(study)[0].counted["run"])
    assert "k2-j1-seed2" in counted
    assert "k4-j8-seed1" in counted
    assert "k2-j1-seed1" not in counted


def test_a_run_that_the_study_does_not_describe_is_shown_apart(study: Path) -> None:
    write_run(study / "k9-j1-seed1", Config(dataset="synthetic", clients=9, lr=0.7, seed=1), "localsgd", [0.3])
    (table, other), (warning,) = read_tables(study)
    assert "1 runs are not part of the study mine and are shown separately: k9-j1-seed1" in warning
    assert len(table.runs) == 8
    assert list(other.runs["run"]) == ["k9-j1-seed1"]
    assert other.name == "mine-other"


def to_a_round(folder: Path) -> None:
    """Make the run in `folder` one of an earlier version, which met epochs to a round."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config.pop(BUDGET) == "to a step"
    path.write_text(json.dumps(config))


def test_seeds_that_met_their_epochs_by_an_older_rule_are_not_mixed_with_others(study: Path) -> None:
    to_a_round(study / "k2-j8-seed1")
    table, other = read_tables(study)[0]
    assert list(other.runs["run"]) == ["k2-j8-seed1"]
    assert runs_by_cell(table)[(2, 8)] == 1
    to_a_round(study / "k2-j8-seed2")
    assert runs_by_cell(only(study)[0])[(2, 8)] == 2


def test_two_runs_of_one_name_with_different_configurations_are_named(tmp_path: Path) -> None:
    for place, lr in (("a", 0.1), ("b", 0.2)):
        write_run(tmp_path / place / "grid" / "one", Config(lr=lr), "localsgd", [0.5])
    tables, (warning,) = read_tables(tmp_path)
    assert "have one name and different configurations (lr = 0.1 and 0.2): both are shown" in warning
    assert [table.name for table in tables] == ["a-grid", "b-grid"]


def test_two_folders_never_share_the_names_of_files(tmp_path: Path) -> None:
    for place in ("a/b", "a-b", "a b", "-x", 4 * ("y" * 200 + "/")):
        write_run(tmp_path / place / "one", Config(), "localsgd", [0.5])
    names = [table.name for table in read_tables(tmp_path)[0]]
    assert len(set(names)) == 5
    assert {"a-b", "a-b-2", "a_b", "x"} < set(names)
    assert max(map(len, names)) < 200


def test_a_duplicate_counts_once_and_the_finished_one(study: Path) -> None:
    shutil.copytree(study / "k2-j1-seed1", study / "k2-j1-copy")
    (study / "k2-j1-copy" / "summary.json").unlink()
    table, (warning,) = only(study)
    assert "k2-j1-copy is the same run as k2-j1-seed1: it is left out" in warning
    assert runs_by_cell(table)[2, 1] == 2


@pytest.mark.parametrize(
    "content", [b"mode = 3", b"\xff", b"title = 3\nmode = 'localsgd'\ngrid = 3", b"x = " + 9999 * b"["]
)
def test_the_runs_of_a_stored_study_that_cannot_be_read_are_shown_without_it(study: Path, content: bytes) -> None:
    (study / "study.toml").write_bytes(content)
    table, (warning,) = only(study)
    assert "is shown without its study" in warning
    assert table.title == "mine"
    assert len(table.runs) == 8


def test_runs_without_a_study_are_arranged_by_the_keys_in_which_they_differ(tmp_path: Path) -> None:
    for lr in (0.1, 0.2):
        for steps in (1, 5):
            config = Config(lr=lr, local_steps=steps)
            write_run(tmp_path / "sweep" / f"{lr}-{steps}", config, "localsgd", [0.5])
    table, _ = only(tmp_path)
    assert table.axes == ("lr", "local-steps")
    assert list(table.cells["coords"]) == [(0.1, 1), (0.1, 5), (0.2, 1), (0.2, 5)]


def test_runs_that_differ_in_many_keys_are_listed_by_name(tmp_path: Path) -> None:
    write_run(tmp_path / "some" / "one-seed1", Config(seed=1), "localsgd", [0.5])
    write_run(tmp_path / "some" / "one-seed2", Config(seed=2), "localsgd", [0.5])
    write_run(tmp_path / "some" / "other", Config(optimizer="lars", lr=0.7), "centralized", [0.5])
    table = only(tmp_path)[0]
    assert runs_by_cell(table) == {("one",): 2, ("other",): 1}
    assert list(table.cells["expected"]) == [2, 1]  # runs without a study are all that were asked for


def test_labels() -> None:
    assert label(("clients", "local-steps"), (4, 10)) == "K = 4, J = 10"
    assert label(("optimizer", "batch-size"), ("lars", 256)) == "lars, batch = 256"
    assert label(("outer", "local-steps"), ("none", 16)) == "outer = none, J = 16"


def test_every_cell_of_the_papers_tables_has_the_papers_value() -> None:
    known = {"table1": 18, "table2": 6, "table2-bn": 6, "table1-scaled": 12}
    for name in study_names():
        study = read_study(name)
        found = {cell.coords: paper_value(study.compare, cell.config.identity(cell.mode)) for cell in study.cells()}
        assert sum(value is not None for value in found.values()) == known.get(name, 0)
        if name == "table1":
            assert found["lars", 2048] == PaperValue(56.91, 56.91, "")
        if name == "table1-scaled":
            assert found["sqrt:batch=256", 8192] == found["linear:batch=256", 8192] == PaperValue(19.74, 19.71, "")
        if name == "table2-bn":
            assert found[12, 30] == PaperValue(42.96, None, "")
