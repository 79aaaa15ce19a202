from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.experiments.study import TWIN
from fedsim.report.load import Group, inferred_group, read_groups, read_results
from tests.conftest import write_run


def only(root: Path) -> tuple[Group, list[str]]:
    (group,), warnings = read_groups(root)
    return group, warnings


def test_a_half_finished_study_keeps_the_places_of_what_is_missing(study: Path) -> None:
    group, warnings = only(study.parent)
    assert warnings == []
    assert (group.name, group.title, group.axes) == ("mine", "A study of the tests", ("clients", "local-steps"))
    assert group.columns == [(2,), (4,)]
    assert group.rows == [(1,), (8,), (TWIN,)]
    counts = {cell.place: (len(cell.finished), len(cell.runs), cell.expected, cell.workers) for cell in group.cells}
    assert counts == {
        (2, 1): (2, 2, 2, 2), (2, 8): (2, 2, 2, 2), (2, TWIN): (2, 2, 2, 2),
        (4, 1): (1, 1, 2, 4), (4, 8): (0, 1, 2, 4), (4, TWIN): (0, 0, 2, 4),
    }  # fmt: skip
    cell = group.at((2,), (8,))
    assert cell is not None
    assert cell.values("final_test_accuracy") == pytest.approx([0.52, 0.54])


def test_a_broken_row_is_skipped_named_and_counted(study: Path) -> None:
    path = study / "k2-j1-seed1" / "metrics.jsonl"
    first, second, *rest = path.read_text().splitlines()
    halves = [first[:20], json.dumps({"round": 2}), json.dumps([1])]
    path.write_text("\n".join([first, *halves, second, *rest]))
    before = path.read_bytes()
    group, (warning,) = only(study)
    assert warning == f"{path}: 3 broken rows are skipped, line 2, 3, 4"
    cell = group.at((2,), (1,))
    assert cell is not None
    assert [len(run.rows) for run in cell.runs] == [4, 4]
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"mode": "x", "seed": 1, "optimizer": "sgdm", "batch-size": 1}'])
def test_a_damaged_configuration_costs_its_run_alone(study: Path, content: str) -> None:
    (study / "k2-j1-seed1" / "config.json").write_text(content)
    group, warnings = only(study)
    assert any("k2-j1-seed1" in warning for warning in warnings)
    assert sum(len(cell.runs) for cell in group.cells) == 7


@pytest.mark.parametrize("content", ["{}", "[]", "{"])
def test_a_damaged_summary_makes_a_run_unfinished(study: Path, content: str) -> None:
    (study / "k2-j1-seed1" / "summary.json").write_text(content)
    group, (warning,) = only(study)
    assert "summary.json: " in warning
    cell = group.at((2,), (1,))
    assert cell is not None
    assert (len(cell.finished), len(cell.runs)) == (1, 2)


def test_a_run_that_is_not_as_the_study_says_is_shown_apart(study: Path) -> None:
    write_run(study / "k9-j1-seed1", Config(dataset="synthetic", clients=9, lr=0.7, seed=1), "localsgd", [0.3])
    (group, other), (warning,) = read_groups(study)
    assert "1 runs are not as the study mine says, shown apart: k9-j1-seed1" in warning
    assert sum(len(cell.runs) for cell in group.cells) == 8
    assert [run.folder.name for run in other.runs] == ["k9-j1-seed1"]
    assert other.name == "mine-other"


def test_two_runs_of_one_name_with_different_configurations_are_warned_of(tmp_path: Path) -> None:
    for place, lr in (("a", 0.1), ("b", 0.2)):
        write_run(tmp_path / place / "grid" / "one", Config(lr=lr), "localsgd", [0.5])
    groups, (warning,) = read_groups(tmp_path)
    assert "have one name and different configurations (lr = 0.1 and 0.2): both are shown" in warning
    assert [group.name for group in groups] == ["a-grid", "b-grid"]


def test_one_run_kept_twice_counts_once(study: Path) -> None:
    shutil.copytree(study / "k2-j1-seed1", study / "k2-j1-copy")
    group, (warning,) = only(study)
    assert "k2-j1-seed1 is the same run as k2-j1-copy: it is left out" in warning
    cell = group.at((2,), (1,))
    assert cell is not None
    assert len(cell.runs) == 2


def test_a_kept_study_that_cannot_be_read_costs_the_study_alone(study: Path) -> None:
    (study / "study.toml").write_text("mode = 3")
    group, (warning,) = only(study)
    assert "study.toml" in warning
    assert group.study is None
    assert len(group.runs) == 8


def test_runs_of_no_study_go_by_the_keys_in_which_they_differ(tmp_path: Path) -> None:
    for lr in (0.1, 0.2):
        for steps in (1, 5):
            config = Config(lr=lr, local_steps=steps)
            write_run(tmp_path / "sweep" / f"{lr}-{steps}", config, "localsgd", [0.5])
    group, _ = only(tmp_path)
    assert group.axes == ("lr", "local-steps")
    assert [cell.place for cell in group.cells] == [(0.1, 1), (0.1, 5), (0.2, 1), (0.2, 5)]


def test_runs_that_differ_in_much_go_by_their_names(tmp_path: Path) -> None:
    write_run(tmp_path / "some" / "one-seed1", Config(seed=1), "localsgd", [0.5])
    write_run(tmp_path / "some" / "one-seed2", Config(seed=2), "localsgd", [0.5])
    write_run(tmp_path / "some" / "other", Config(optimizer="lars", lr=0.7), "centralized", [0.5])
    group, _ = only(tmp_path)
    assert [(cell.place, len(cell.runs)) for cell in group.cells] == [(("one",), 2), (("other",), 1)]


def test_a_record_older_than_a_key_has_its_default(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "some" / "old", Config(), "localsgd", [0.5])
    held = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({name: held[name] for name in held if name != "validation"}))
    (result,) = read_results(tmp_path, pytest.fail)
    assert result.identity["validation"] == 0
    assert result.tested_on == "test"
    assert inferred_group(tmp_path, [result]).cells[0].workers == 4


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no runs: give a folder of results"):
        read_groups(tmp_path)
    folder = write_run(tmp_path / "some" / "one", Config(), "localsgd", [0.5])
    with pytest.raises(UserError, match="is one run: give the folder that holds it"):
        read_groups(folder)
