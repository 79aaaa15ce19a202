"""``fedsim watch``, and the line of a run in a terminal."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.experiments.cost import measured_rates
from fedsim.experiments.progress import shown_rows, status
from fedsim.experiments.watch import QUIET_SECONDS, lines_of, watch
from fedsim.report.load import read_records
from tests.conftest import STUDY, write_run

ROW: dict[str, Any] = {
    "round": 123,
    "epoch": 2.0,
    "lr": 0.1,
    "seconds": 10.0,
    "train_loss": 2.3,
    "test_loss": 2.25,
    "test_accuracy": 0.345,
    "tested_on": "test",
}


def watched(root: Path, terminal: bool = False, width: int = 80) -> str:
    console = Console(width=width, file=(text := io.StringIO()), force_terminal=terminal, height=30)
    watch(root, console)
    return text.getvalue()


def test_loss_accuracy_pace_and_time_left_by_hand() -> None:
    assert status(ROW, 8000, 10.0) == "test 34.50%  0:00:40 left  loss 2.300  1,600 img/s"
    resumed = {**ROW, "epoch": 3.0, "seconds": 110.0, "test_accuracy": None, "train_loss": None}
    assert status({**ROW, "tested_on": "validation"}, 8000, None) == "val 34.50%  loss 2.300"
    assert status(resumed, 8000, 10.0, ROW, 0.2) == "test 20.00%  0:11:40 left  loss   nan  80 img/s"


def test_the_line_of_a_run_fits_80_columns_and_a_pipe_has_rows_alone() -> None:
    config = Config(rounds=12345, clients=2).changed({"device": "cpu", "threads": 1})
    for terminal in (True, False):
        console = Console(width=80, file=(text := io.StringIO()), force_terminal=terminal)
        with shown_rows(config, "localsgd", console) as show:
            show(ROW)
            show({**ROW, "round": 124, "epoch": 2.1, "seconds": 3000.0, "test_accuracy": None})
        shown = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in text.getvalue().splitlines()]
        assert any(re.search("round 124/12345 .* left  loss 2.300", line) for line in shown) == terminal
        assert all(len(part) <= 80 and "…" not in part for line in shown for part in line.split("\r"))


def test_all_runs_of_a_study_are_shown_from_their_records(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "mine"
    config = Config(dataset="synthetic:images=8000", clients=2, epochs=4.0)
    row = {name: ROW[name] for name in ("train_loss", "lr", "tested_on")}
    for name, finished in (("k2-j1-seed1", True), ("k2-j8-seed1", False)):
        run = write_run(folder / name, config, "localsgd", [0.1, 0.2], finished, seconds=20.0)
        rows = [{**json.loads(line), **row} for line in (run / "metrics.jsonl").read_text().splitlines()]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"round": 3, "ep')
    old = time.time() - 3600
    os.utime(folder / "k2-j8-seed1/metrics.jsonl", (old, old))
    (folder / "study.toml").write_text(STUDY)
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    (folder / "new").mkdir()
    (folder / "new" / "config.json").write_text((folder / "k2-j1-seed1/config.json").read_text())
    first, *lines = watched(tmp_path / "results").splitlines()
    assert first == f"{folder}: 1 of 12 runs finished"
    assert lines[0].startswith("  broken  cannot be read: ")
    assert lines[1] == "  k2-j1-seed1  round 2/25  test 20.00%  40 s"
    assert re.fullmatch(
        r"  k2-j8-seed1  round 2/25  test 20.00%  0:00:40 left  loss 2.300  400 img/s  row 1:00:\d\d ago", lines[2]
    )
    assert lines[3] == "  new  no rows yet"


def write_shown(folder: Path, config: Config, finished: bool = True) -> Path:
    """A run of one round, whose row has what is shown of it."""
    run = write_run(folder, config, "centralized", [0.5], finished)
    rows = {**json.loads((run / "metrics.jsonl").read_text()), **{k: ROW[k] for k in ("train_loss", "tested_on")}}
    (run / "metrics.jsonl").write_text(json.dumps(rows) + "\n")
    return run


def test_in_a_terminal_it_ends_when_all_runs_are_finished(tmp_path: Path) -> None:
    write_shown(tmp_path / "results" / "one", Config(epochs=1.0))
    assert "one  round 1/1  test 50.00%" in watched(tmp_path / "results", terminal=True)


@pytest.mark.parametrize("expected", [1, 12])
def test_in_a_terminal_it_ends_when_nothing_goes_on(tmp_path: Path, expected: int) -> None:
    """A run that was stopped, or a study of which only a cell was run: neither has changed for a minute."""
    folder = tmp_path / "results" / "mine"
    run = write_shown(folder / "k2-j1-seed1", Config(epochs=2.0), finished=expected > 1)
    if expected > 1:
        (folder / "study.toml").write_text(STUDY)
    assert lines_of(folder)[1]
    for path in run.iterdir():
        os.utime(path, (0, time.time() - 2 * QUIET_SECONDS))
    with (run / ".lock").open("w") as file:
        assert not lines_of(folder)[1]
        fcntl.flock(file, fcntl.LOCK_EX)
        assert lines_of(folder)[1]
    assert "k2-j1-seed1  round 1/2" in watched(tmp_path / "results", terminal=True)


def test_a_run_is_shown_without_its_data_set(tmp_path: Path) -> None:
    write_shown(tmp_path / "one", Config(dataset="nowhere.npz", epochs=2.0), finished=False)
    assert watched(tmp_path).splitlines()[1] == "  one  round 1  epoch 1.00  test 50.00%  loss 2.300"


def test_what_a_record_names_is_not_imported(tmp_path: Path) -> None:
    """Neither by ``watch`` nor where the pace of finished runs is read."""
    config = Config(dataset="tests.exits:load", model="tests.exits:build", outer="tests.exits:Strategy")
    write_shown(tmp_path / "one", config, finished=False)
    write_run(tmp_path / "two", config, "localsgd", [0.5], seconds=20.0)
    assert watched(tmp_path).splitlines()[1:] == [
        "  two  round 1  epoch 1.00  test 50.00%  20 s",
        "  one  round 1  epoch 1.00  test 50.00%  loss 2.300",
    ]
    assert measured_rates(tmp_path) == {}
    assert list(read_records(tmp_path).runs["dataset"]) == ["tests.exits:load"] * 2
    assert "tests.exits" not in sys.modules


@pytest.mark.parametrize("row", ["[1]", '{"round": 3}', "{"])
def test_a_run_with_a_damaged_row_is_named(tmp_path: Path, row: str) -> None:
    run = write_shown(tmp_path / "one", Config(epochs=2.0), finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(row + "\n")
    assert watched(tmp_path).splitlines()[1].startswith("  one  cannot be read: ")


def test_a_folder_without_runs_is_one_line(tmp_path: Path) -> None:
    for root, words in ((tmp_path, "holds no runs"), (tmp_path / "none", "is not a folder")):
        with pytest.raises(UserError, match=words):
            watch(root, Console(file=io.StringIO()))
