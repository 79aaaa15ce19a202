from __future__ import annotations

import json
import math
import re
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.network import Network
from fedsim.report.answers import answers
from fedsim.report.differences import paired_differences
from fedsim.report.figures import mean_curves
from fedsim.report.load import read_records
from fedsim.report.result_table import read_tables
from fedsim.report.tables import csv_text, notes, origins, progress, result_table, runs_frame
from fedsim.report.time_to_accuracy import Plan, time_table, times_to_target
from fedsim.runs.records import read_rows, read_summary, sha256_of_summary
from tests.conftest import TIMES, write_run

RESULTS = Path(__file__).parents[2] / "results"
ROW = {"round": 1, "epoch": 1.0, "steps_done": 8, "test_accuracy": 0.5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of three rounds; beside it an undamaged one."""
    write_run(tmp_path / "some" / "other", Config(seed=2), "localsgd", [0.1, 0.2, 0.3])
    return write_run(tmp_path / "some" / "damaged", Config(seed=1), "localsgd", [0.1, None, 0.4])


def warning_of(root: Path, file: str) -> str:
    """The only warning, which names `file`; the undamaged run is read all the same."""
    records = read_records(root)
    (warning,) = records.warnings
    assert f"{root / 'some' / 'damaged' / file}: " in warning
    other = records.runs[records.runs["run"] == "other"]
    assert list(other["final_test_accuracy"]) == [0.3]
    assert len(records.rows[records.rows["run"] == other.index[0]]) == 3
    return warning


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"{}", b"null", b"\xff\xfe", b'"' + 99_999 * b"[" + b'"', 99_999 * b"[",
     b'{"mode": "x", "seed": 1, "optimizer": "sgdm", "batch-size": 1}',
     b'{"mode": ["localsgd"], "seed": 1, "optimizer": "sgdm", "batch-size": 1}',
     b'{"mode": "localsgd", "seed": "1e", "optimizer": "sgdm", "batch-size": 1}',
     b'{"mode": "localsgd", "seed": 1, "optimizer": "sgdm", "batch-size": 1, "clients": 0}',
     b'{"mode": "localsgd", "seed": 1, "optimizer": "sgdm", "batch-size": 1, "lr": NaN}'],
)  # fmt: skip
def test_a_damaged_configuration_costs_its_run_alone(folder: Path, tmp_path: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert warning_of(tmp_path, "config.json").endswith("the run is left out")
    assert list(read_records(tmp_path).runs["run"]) == ["other"]


@pytest.mark.parametrize(
    "change",
    [b"{", b"[]", b"{}", b"\xff", {"finished": "yes"}, {"final_test_accuracy": "0.5"}, {"best_test_accuracy": math.nan},
     {"final_test_accuracy": 50}, {"bytes_up": "many"}, {"epoch": -1.0}, {"seconds": math.inf}, {"versions": []},
     {"syncs": 10**400}, {"parameters": True}, {"commit": 7}],
)  # fmt: skip
def test_a_damaged_summary_makes_its_run_unfinished(folder: Path, tmp_path: Path, change: Any) -> None:
    path = folder / "summary.json"
    whole = json.loads(path.read_text())
    path.write_bytes(change if isinstance(change, bytes) else json.dumps({**whole, **change}).encode())
    assert warning_of(tmp_path, "summary.json").endswith("it is ignored")
    run = read_records(tmp_path).runs.set_index("run").loc["damaged"]
    assert (run["finished"], run["final_test_accuracy"], run["epoch"]) == (False, 0.4, 3)


@pytest.mark.parametrize(
    "line",
    [b"{", b"[1]", b'{"round": 2}', b"\xff", b"", json.dumps({**ROW, "round": "1"}).encode(),
     json.dumps({**ROW, "test_accuracy": "0.5"}).encode(), json.dumps({**ROW, "epoch": math.nan}).encode(),
     json.dumps({**ROW, "bytes_up": [1]}).encode(), json.dumps({**ROW, "steps_done": -1}).encode()],
)  # fmt: skip
def test_a_damaged_row_is_skipped_named_and_counted(folder: Path, tmp_path: Path, line: bytes) -> None:
    path = folder / "metrics.jsonl"
    first, *rest = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, line, *rest]))
    before = path.read_bytes()
    assert warning_of(tmp_path, "metrics.jsonl").endswith("1 damaged rows are skipped, line 2")
    assert len(read_records(tmp_path).rows) == 6
    assert path.read_bytes() == before


def test_a_run_whose_rows_are_not_those_of_its_summary_is_left_out(folder: Path, tmp_path: Path) -> None:
    rows, summary = folder / "metrics.jsonl", folder / "summary.json"
    content = json.loads(summary.read_text())

    def write(**changes: Any) -> None:
        sha256 = {"metrics.jsonl": digest, "summary.json": sha256_of_summary({**content, **changes})}
        summary.write_text(json.dumps({**content, **changes, "sha256": sha256}))

    digest = sha256(rows.read_bytes()).hexdigest()
    write()
    assert read_records(tmp_path).warnings == []
    rows.write_text(rows.read_text().replace("0.4", "0.5"))
    assert warning_of(tmp_path, "metrics.jsonl").endswith(
        "its SHA-256 is not the one in summary.json; the run is left out"
    )
    assert list(read_records(tmp_path).runs["run"]) == ["other"]
    write(finished=False)  # a resumed run has more rows
    assert read_records(tmp_path).warnings == []


def test_a_summary_that_was_edited_is_ignored(folder: Path, tmp_path: Path) -> None:
    path = folder / "summary.json"
    content = json.loads(path.read_text())
    sealed = {**content, "sha256": {"summary.json": sha256_of_summary(content)}}
    path.write_text(json.dumps(sealed))
    assert read_records(tmp_path).warnings == []
    path.write_text(json.dumps({**sealed, "best_test_accuracy": 0.99}))
    assert warning_of(tmp_path, "summary.json").endswith("its SHA-256 is not the one in it; it is ignored")


def test_older_runs_have_the_columns_of_now(folder: Path, tmp_path: Path) -> None:
    now = read_records(tmp_path)
    for path in (folder / "metrics.jsonl", folder / "summary.json"):
        path.write_text(path.read_text().replace("steps_done", "local_steps"))
    assert read_records(tmp_path).rows.equals(now.rows)
    assert read_records(tmp_path).runs.astype(str).equals(now.runs.astype(str))
    assert [row["steps_done"] for row in read_rows(folder)] == [10, 20, 30]
    assert (read_summary(folder) or {})["steps_done"] == 30


def test_what_is_not_a_file_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "summary.json").unlink()
    (folder / "summary.json").mkdir()
    assert "not a file" in warning_of(tmp_path, "summary.json")


def test_unknown_and_missing_columns_are_no_damage(folder: Path, tmp_path: Path) -> None:
    row = {**ROW, "overhead_bytes": 9, "left_out": {"a": 1}}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**ROW, "round": 2, "syncs": 3}))
    records = read_records(tmp_path)
    assert records.warnings == []
    rows = records.rows[records.rows["run"] == 0]
    assert list(rows["syncs"].isna()) == [True, False]
    assert rows["bytes_up"].isna().all()


def test_bytes_of_rows_without_a_version_are_read_without_their_overhead() -> None:
    """Three seeds of a cell, two of which recorded the overhead, within their bytes."""
    folders = [RESULTS / "table2-bf16" / f"k12-j10-seed{seed}" for seed in (1, 2, 3)]
    sent = 200 * 12 * 7_097_248  # rounds, clients, bytes of the model
    runs = read_records(RESULTS / "table2-bf16").runs
    cell = runs[runs["folder"].isin(folders)]
    assert list(cell["bytes_up"]) == list(cell["bytes_down"]) == [sent] * 3
    assert list(cell["overhead_bytes_up"]) == [None, 1_703_089_920, 1_703_089_920]
    for folder in folders:
        row, summary = read_rows(folder)[-1], read_summary(folder)
        assert summary
        assert (row["bytes_up"], summary["bytes_up"]) == (sent, sent)


def test_a_record_older_than_a_key_has_its_default(folder: Path, tmp_path: Path) -> None:
    held = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({name: held[name] for name in held if name != "validation"}))
    runs = read_records(tmp_path).runs
    assert list(runs["validation"]) == [0, 0]
    assert runs["identity"].nunique() == 1


def test_of_a_repeated_round_the_last_row_counts(folder: Path, tmp_path: Path) -> None:
    (folder / "metrics.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "test_accuracy": 0.7}))
    rows = read_records(tmp_path).rows
    assert list(rows["test_accuracy"][rows["run"] == 0]) == [0.7]


SCALARS = st.none() | st.booleans() | st.integers() | st.sampled_from([-1, 10**20, 10**400]) | st.floats() | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2)
)
CONFIG = {"mode": "localsgd", **Config(clients=2).identity("localsgd")}
SUMMARY = {"finished": True, "best_test_accuracy": 0.5, "final_test_accuracy": 0.5, **ROW, "syncs": 8, "bytes_up": 9,
           "bytes_down": 9, "seconds": 1.0, "parameters": 9, "device": "cpu", "commit": "", "command": ""}  # fmt: skip
OTHER_KEYS = st.dictionaries(st.sampled_from([*CONFIG, *SUMMARY, "new"]), VALUES, max_size=3)
DAMAGE = OTHER_KEYS | st.binary(max_size=20)


def damaged(record: dict[str, Any], damage: Any) -> bytes:
    return damage if isinstance(damage, bytes) else json.dumps({**record, **damage}).encode()


@settings(derandomize=True, deadline=None, max_examples=10 * TIMES, suppress_health_check=list(HealthCheck))
@given(config=OTHER_KEYS, summary=DAMAGE, row=DAMAGE, study=st.sampled_from(["", "mode = 3", "title = 3", "\0"]))
def test_no_record_breaks_the_tables(config: Any, summary: Any, row: Any, study: str) -> None:
    with tempfile.TemporaryDirectory() as root:
        whole = write_run(Path(root) / "some" / "whole", Config(clients=2, seed=1), "localsgd", [0.1, 0.3])
        other = write_run(Path(root) / "some" / "fuzzed", Config(clients=2, seed=2), "localsgd", [0.1, 0.2])
        (other / "config.json").write_bytes(damaged(CONFIG, config))
        (other / "summary.json").write_bytes(damaged(SUMMARY, summary))
        with (other / "metrics.jsonl").open("ab") as file:
            file.write(damaged(ROW, row))
        if study:
            (whole.parent / "study.toml").write_text(study)
        tables, _ = read_tables(Path(root))
        assert "whole" in {run for table in tables for run in table.runs["run"]}
        for table in tables:
            changes = paired_differences(table)
            texts = [str(result_table(table, changes)), *notes(table), progress(table), str(origins(table))]
            plan = Plan(0.15, Network(1e6, 0.01), 0.1)
            times = times_to_target(table, plan)
            texts += answers(table, changes)
            texts += [csv_text(runs_frame(table)), csv_text(mean_curves(table)), str(time_table(times, table, plan))]
            assert not re.search(r"\b(nan|None)\b", " ".join(texts))


def test_nothing_to_read_is_reported(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is one run: give the folder that holds it"):
        read_tables(folder)
    (tmp_path / "empty").mkdir()
    for missing in ("empty", "nowhere"):
        with pytest.raises(UserError, match="holds no runs: give a folder of results"):
            read_tables(tmp_path / missing)
    with pytest.raises(UserError, match="cannot be read"):
        read_tables(tmp_path / ("n" * 300))
