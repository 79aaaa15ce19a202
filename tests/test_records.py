from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path

import pytest
import torch

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.records import Run, default_name, provenance, read_rows, written_whole
from tests.conftest import Execute, assert_same_bits, final_model


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with contextlib.suppress(RuntimeError), written_whole(path) as file:
        file.write(b"half of what was to co")
        raise RuntimeError
    assert path.read_bytes() == b"before"
    with written_whole(path) as file:
        file.write(b"after")
    assert path.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_of_another_configuration_is_refused_and_kept(run: Execute) -> None:
    first = run(name="taken")
    before = {path: path.read_bytes() for path in first.folder.iterdir()}
    with pytest.raises(UserError, match=r"holds a run of another configuration \(lr = 0.01, not 0.5\): give another"):
        run(name="taken", lr=0.5)
    with pytest.raises(UserError, match="holds a run of another configuration"):
        run("centralized", name="taken")
    assert {path: path.read_bytes() for path in first.folder.iterdir()} == before


def test_what_does_not_shape_the_result_may_change(run: Execute) -> None:
    run(name="same", stop_after_rounds=2)
    assert run(name="same", checkpoint_every=3).finished


def test_a_folder_that_is_no_runs_is_refused_and_kept(small: Config, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="mine is not empty and no run's folder"):
        Run(small.changed({"name": "mine"}), "localsgd")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_results_dir_that_cannot_be_written_is_named(small: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"results-dir = .*file cannot be written"):
        Run(small.changed({"results-dir": str(tmp_path / "file")}), "localsgd")


def test_a_run_that_another_process_runs_is_refused(run: Execute) -> None:
    first = run(name="busy", stop_after_rounds=1)
    with first.held(), pytest.raises(UserError, match="another process is running it"):
        run(name="busy")
    assert run(name="busy").finished


def test_who_has_patience_waits_for_another_process(run: Execute) -> None:
    first = run(name="busy", stop_after_rounds=1)
    with contextlib.ExitStack() as holding:
        holding.enter_context(first.held())
        threading.Timer(1.5, holding.close).start()
        with first.held(patience=60):
            pass
    with first.held(), pytest.raises(UserError, match="another process is running it"), first.held(patience=1):
        pass


def test_a_damaged_checkpoint_is_refused_by_name(run: Execute) -> None:
    part = run(name="cut", stop_after_rounds=3)
    path = part.folder / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"checkpoint.pt is damaged: remove it to begin the run anew"):
        run(name="cut")
    path.unlink()
    assert_same_bits(final_model(run(name="cut")), final_model(run(name="whole")))


def test_a_checkpoint_of_another_version_is_refused_by_name(run: Execute) -> None:
    part = run(name="old", stop_after_rounds=1)
    path = part.folder / "checkpoint.pt"
    torch.save({**torch.load(path, weights_only=True), "version": 0}, path)
    with pytest.raises(UserError, match="is of another version of fedsim"):
        run(name="old")


def test_a_damaged_config_is_named(run: Execute) -> None:
    part = run(name="bad", stop_after_rounds=1)
    (part.folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is damaged"):
        run(name="bad")


def test_only_a_last_row_may_be_cut_short(tmp_path: Path) -> None:
    rows = tmp_path / "metrics.jsonl"
    rows.write_text('{"round": 1}\n{"rou')
    assert read_rows(tmp_path) == [{"round": 1}]
    rows.write_text('{"round": 1}\n{"rou\n{"round": 3}\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        read_rows(tmp_path)


def test_numbers_that_are_not_finite_become_null(small: Config) -> None:
    run = Run(small.changed({"name": "inf"}), "localsgd")
    run.add({"round": 1, "test_loss": float("inf"), "train_loss": 1.5})
    assert json.loads((run.folder / "metrics.jsonl").read_text())["test_loss"] is None


def test_names_tell_configurations_apart_but_not_machines() -> None:
    config = Config()
    assert default_name(config, "localsgd").startswith("localsgd-sgdm-b64-k4-j10-seed2025-")
    assert default_name(config, "localsgd") != default_name(config.changed({"lr": 0.5}), "localsgd")
    assert default_name(config, "localsgd") == default_name(config.changed({"device": "cpu", "threads": 7}), "localsgd")
    assert default_name(config, "centralized") == default_name(config.changed({"clients": 7}), "centralized")


def test_provenance_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_ORIGIN", json.dumps({"commit": "abc", "command": "run.py localsgd"}))
    origin = provenance("cpu")
    assert (origin["commit"], origin["command"]) == ("abc", "run.py localsgd")
    assert {"python", "fedsim", "flwr", "torch"} <= origin["versions"].keys()
