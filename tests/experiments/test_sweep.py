"""Running studies: the command study, and what its runner does with cells."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import fedsim
from fedsim.cli.commands import cli
from fedsim.errors import RunFailed, UserError
from fedsim.experiments.study import read_study
from fedsim.experiments.sweep import OneByOne, run_studies
from fedsim.report.result_table import ResultTable, read_tables
from fedsim.runs.folder import read_config
from fedsim.runs.records import read_rows, read_summary
from fedsim.runs.run import Run

TINY = """title = "Tiny"
mode = "localsgd"
twins = true
[grid]
clients = [1, 2]
local-steps = [2]
seed = [1, 2]
[set]
dataset = "synthetic:images=128"
model = "lenet5"
batch-size = 16
epochs = 2.0
"""
HERE = {"device": "cpu", "threads": 1}
Study = Callable[..., str]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def study(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Study:
    """Run the command with these options in the folder of tiny.toml; returns what it printed."""
    monkeypatch.chdir(tiny.parent)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["run.py", "study"])

    def run(options: str = "") -> str:
        cli(f"study tiny.toml --device cpu --threads 1 {options}".split(), standalone_mode=False)
        return capsys.readouterr().out

    return run


def run_here(path: Path, seeds: Sequence[int] = (1,), width: int = 200, **keys: Any) -> tuple[list[str], str]:
    """Run the study in the file `path`; returns the names of the cells that failed, and what was printed."""
    console = Console(width=width, file=(text := io.StringIO()), force_terminal=True)
    study = read_study(str(path))
    cells = study.cells(seeds, {**HERE, **keys})
    try:
        return run_studies(
            [(study, cells)], path.parent / "results", OneByOne("local"), False, console
        ), text.getvalue()
    finally:
        assert text.getvalue().count("\x1b[?25l") == text.getvalue().count("\x1b[?25h")  # the cursor is shown again


def finished_runs(table: ResultTable) -> list[int]:
    """How many runs of each cell are finished."""
    cells: list[int] = [int(table.runs["finished"][table.runs["cell"] == cell].sum()) for cell in table.cells.index]
    return cells


def test_a_study_runs_every_cell_and_baseline_in_its_folder_and_shows_its_table(study: Study, tiny: Path) -> None:
    text = study()
    folder = tiny.parent / "results" / "tiny"
    names = {f"k{k}-{what}-seed{seed}" for k in (1, 2) for what in ("j2", "twin") for seed in (1, 2)}
    assert {path.name for path in folder.iterdir()} == names | {"study.toml"}
    assert all((summary := read_summary(folder / name)) and summary["finished"] for name in names)
    assert read_study(str(folder / "study.toml")) == read_study(str(tiny))
    assert "Tiny\n" in text
    assert "large batch" in text
    (table,), warnings = read_tables(folder)
    assert (table.title, warnings) == ("Tiny", [])
    assert finished_runs(table) == [2, 2, 2, 2]


def test_chosen_cells_run_alone_and_one_that_is_not_there_is_named(study: Study, tiny: Path) -> None:
    folder = tiny.parent / "results" / "tiny"
    with pytest.raises(UserError, match=r"cells = 'k3' matches no cell of tiny: it has k1-j2, k2-j2, k1-twin, k2-twin"):
        study("--cells k1-*,k3")
    assert not folder.exists()
    study("--cells k2-j2")
    assert {path.name for path in folder.iterdir()} == {"k2-j2-seed1", "k2-j2-seed2", "study.toml"}
    study("--cells k1-* --seeds 1")
    assert {path.name for path in folder.glob("k1-*")} == {"k1-j2-seed1", "k1-twin-seed1"}


@pytest.mark.parametrize("from_python", [False, True])
def test_what_a_study_sets_for_its_machine_holds_unless_a_flag_is_given(tiny: Path, from_python: bool) -> None:
    tiny.write_text(f"{TINY}threads = 3\nstop-after-epochs = 1.0\ndevice = 'cpu'\n")
    results = str(tiny.parent / "results")
    if from_python:
        fedsim.study(tiny, cells=["k2-j2"], seeds=list(np.arange(1, 2)), results_dir=results, progress=False)
        fedsim.study(tiny, cells=["k1-j2"], seeds=[1], results_dir=results, progress=False, threads=1)
    else:
        common = f"study {tiny} --seeds 1 --results-dir {results} --cells"
        cli(f"{common} k2-j2".split(), standalone_mode=False)
        cli(f"{common} k1-j2 --threads 1 --stop-after-epochs 0".split(), standalone_mode=False)
    runs = [tiny.parent / "results/tiny" / f"k{k}-j2-seed1" for k in (2, 1)]
    assert [read_config(run)["threads"] for run in runs] == [3, 1]
    assert [(read_summary(run) or {})["finished"] for run in runs] == [False, not from_python]


def test_a_narrow_terminal_shows_count_metric_and_time_left_and_keeps_finished_cells(tiny: Path) -> None:
    study = tiny.read_text().replace("clients = [1, 2]", "clients = [2]").replace("twins = true\n", "")
    tiny.write_text(study)
    _, text = run_here(tiny, width=60)
    text = re.sub(r"\x1b\[[\d;?]*\w", "", text)
    assert re.search(r"1/1  tiny/k2-j2-seed1  test [\d.]+%  [\d.]+ s", text)
    assert re.search(r"[1-4]/4  k2-j2-seed1  test +[\d.]+%  [\d:]+ left ", text)


def test_a_study_in_another_precision_is_another_study(study: Study, tiny: Path) -> None:
    study("--seeds 1")
    study("--seeds 1 --precision bf16")
    tables, warnings = read_tables(tiny.parent / "results")
    assert [(table.name, table.title) for table in tables] == [("tiny", "Tiny"), ("tiny-bf16", "Tiny, in bf16")]
    assert warnings == []
    for table, precision in zip(tables, ("fp32", "bf16"), strict=True):
        assert set(table.runs["precision"]) == {precision}
        assert finished_runs(table) == [1] * 4


def test_interrupted_studies_resume_and_finished_cells_are_skipped(study: Study, tiny: Path) -> None:
    folder = tiny.parent / "results" / "tiny"
    study("--seeds 1 --stop-after-epochs 1")
    (table,), _ = read_tables(folder)
    assert finished_runs(table) == [0] * 4
    study("--seeds 1")
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*/metrics.jsonl")}
    assert len(written) == 4
    study("--seeds 1,3")
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    (table,), _ = read_tables(folder)
    assert finished_runs(table) == [2] * 4


def test_a_study_whose_only_axis_is_the_seed_has_a_table_of_one_cell(study: Study, tiny: Path) -> None:
    tiny.write_text(TINY.replace("clients = [1, 2]\nlocal-steps = [2]\n", "").replace("twins = true\n", ""))
    text = study("--cells *")
    assert {path.name for path in (tiny.parent / "results" / "tiny").glob("s*1")} == {"seed1"}
    assert "Accuracy on test images" in text
    assert " ± " in text


def test_everything_is_checked_before_the_first_run(study: Study, tiny: Path) -> None:
    tiny.write_text(TINY.replace("clients = [1, 2]", "clients = [1, 999]"))
    with pytest.raises(UserError, match="tiny/k999-j2-seed1: clients = 999"):
        study()
    assert not (tiny.parent / "results").exists()


@pytest.mark.parametrize("tune", ["", "[tune]\nvalidation = 16\ngrid = {lr = [0.1]}\n"])
def test_two_studies_of_one_name_are_refused(study: Study, tiny: Path, tune: str) -> None:
    tiny.write_text(TINY + tune)
    with pytest.raises(UserError, match="studies tiny, tiny: give each name once"):
        study(str(tiny))
    assert not (tiny.parent / "results").exists()


def test_cells_that_fail_are_named_and_the_others_run(study: Study, tiny: Path) -> None:
    case = "[[case]]\nwhen = {clients = [2]}\nset = {lr = 1e9, momentum = 0.99, epochs = 6.0}\n"
    tiny.write_text(TINY.replace("[set]", f"{case}[set]"))
    with pytest.raises(RunFailed, match="2 of 4 cells failed: tiny/k2-j2-seed1, tiny/k2-twin-seed1"):
        study("--seeds 1")
    (table,), _ = read_tables(tiny.parent / "results" / "tiny")
    assert finished_runs(table) == [1, 0, 1, 0]


def test_a_cell_with_damaged_records_fails_alone(tiny: Path) -> None:
    run_here(tiny, [1], 200, **{"stop-after-epochs": 1.0})
    folder = tiny.parent / "results" / "tiny"
    for checkpoint in (folder / "k1-j2-seed1").glob("checkpoint*.pt"):
        checkpoint.write_bytes(b"")
    failed, text = run_here(tiny)
    assert failed == ["tiny/k1-j2-seed1"]
    assert "is damaged" in text
    assert len(list(folder.glob("*/model.pt"))) == 4  # that of the early stop of the one that failed
    assert sum((read_summary(run) or {})["finished"] for run in folder.glob("k*")) == 3


def test_a_cell_that_another_process_runs_is_awaited_after_the_others(tiny: Path) -> None:
    cells = read_study(str(tiny)).cells([1], {**HERE, "results-dir": str(tiny.parent / "results" / "tiny")})
    first, *others = (Run(cell.config, cell.mode) for cell in cells)
    let_go = threading.Event()
    held = first.lock()
    held.__enter__()

    def release() -> None:
        while not let_go.is_set() and not all(run.finished for run in others):
            time.sleep(0.05)
        assert not first.finished
        held.__exit__(None, None, None)

    other_process = threading.Thread(target=release)  # a lock is of the file opened, not of the process
    other_process.start()
    try:
        failed, text = run_here(tiny)
    finally:
        let_go.set()
        other_process.join()
    assert failed == []
    assert "waiting for other processes to run tiny/k1-j2-seed1" in text
    assert first.finished


def leave(number: int, frame: object) -> None:
    sys.exit(128 + number)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a file open at that moment
@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_an_interrupt_ends_the_command_at_once(tiny: Path, number: signal.Signals, kind: type[BaseException]) -> None:
    tiny.write_text(TINY.replace("epochs = 2.0", "epochs = 10000.0"))
    over = threading.Event()

    def interrupt() -> None:
        while not over.is_set() and not any(read_rows(run) for run in (tiny.parent / "results/tiny").glob("k*")):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    handlers = {signal.SIGTERM: leave, signal.SIGINT: signal.default_int_handler}  # ignored under nohup
    before = {each: signal.signal(each, handler) for each, handler in handlers.items()}
    user = threading.Thread(target=interrupt)
    user.start()
    try:
        with pytest.raises(kind):
            run_here(tiny)
    finally:
        over.set()
        user.join()
        for each, handler in before.items():
            signal.signal(each, handler)
    assert [run.name for run in (tiny.parent / "results/tiny").glob("k*")] == ["k1-j2-seed1"]


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without the privileges of root, which may write anywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("mode", [0o000, 0o555])
def test_results_that_cannot_be_entered_or_written_are_one_line(tiny: Path, mode: int) -> None:
    (tiny.parent / "results").mkdir(mode)
    for folder in tiny.parents:
        if Path(tempfile.gettempdir()) in folder.parents:
            folder.chmod(0o755)  # for all to enter, but for the results
    with (
        as_nobody(),
        pytest.raises(UserError, match=r"results-dir = .*/results cannot be written \(Permission denied\)"),
    ):
        run_here(tiny)


def test_results_that_are_a_file_are_one_line(tiny: Path) -> None:
    (tiny.parent / "results").write_text("")
    with pytest.raises(UserError, match=r"results-dir = .*/results cannot be written"):
        run_here(tiny)
