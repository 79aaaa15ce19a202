from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.config import Config, Mode
from fedsim.device import resolve
from fedsim.errors import UserError
from fedsim.experiments.execute import execute
from fedsim.records import Run, default_name, provenance, read_rows, resumed, written_whole
from tests.conftest import Execute, assert_same_bits, final_model, rows_of


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


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def of_another_version(path: Path) -> None:
    torch.save({**torch.load(path, weights_only=True), "version": 0}, path)


def of_another_configuration(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "config": {**checkpoint["config"], "lr": 0.5}}, path)


REFUSED: dict[Callable[[Path], None], str] = {
    cut: "checkpoint.pt is damaged",
    of_another_version: "checkpoint.pt is of another version of fedsim",
    of_another_configuration: "checkpoint.pt is of another configuration",
}


@pytest.mark.parametrize("spoil", REFUSED)
@pytest.mark.parametrize("mode", ["localsgd", "centralized"])
def test_the_checkpoint_before_a_refused_one_is_used(
    run: Execute, mode: Mode, spoil: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"checkpoint_every": 1, "epochs": 4.0, "stop_after_epochs": 3.0}
    part = run(mode, name="part", **keys)
    last, before = (part.folder / f"checkpoint{name}.pt" for name in ("", "-before"))
    spoil(last)
    spoilt, good = last.read_bytes(), torch.load(before, weights_only=True)
    again = run(mode, name="part", epochs=4.0)
    told = capsys.readouterr().err
    assert f"{REFUSED[spoil]}: the one before it, of round {good['round']}, is used" in told
    assert (part.folder / "checkpoint-refused.pt").read_bytes() == spoilt
    assert_same_bits(final_model(again), final_model(run(mode, name="whole", epochs=4.0)))
    assert rows_of(again) == rows_of(run(mode, name="whole", epochs=4.0))


@pytest.mark.parametrize("spoil", REFUSED)
def test_with_no_other_checkpoint_a_refused_one_is_an_error(run: Execute, spoil: Callable[[Path], None]) -> None:
    part = run(name="cut", stop_after_rounds=3)
    path = part.folder / "checkpoint.pt"
    spoil(path)
    with pytest.raises(UserError, match=REFUSED[spoil] + ": remove it to begin the run anew"):
        run(name="cut")
    path.unlink()
    assert_same_bits(final_model(run(name="cut")), final_model(run(name="whole")))


def test_killed_between_two_checkpoints_the_older_is_used(run: Execute) -> None:
    """The new one is written after the last one has been put aside."""
    part = run(name="part", checkpoint_every=2, stop_after_rounds=4)
    (part.folder / "checkpoint.pt").unlink()
    assert_same_bits(final_model(run(name="part")), final_model(run(name="whole")))


def test_resume_takes_what_shapes_the_result_from_the_run(run: Execute, small: Config) -> None:
    whole = run(name="whole", lr=0.03, local_steps=3)
    run(name="part", lr=0.03, local_steps=3, stop_after_rounds=2)
    bare = Config(results_dir=small.results_dir, resume="part")
    again = execute(resolve(resumed(bare), "localsgd"), "localsgd")
    assert again.folder.name == "part"
    assert_same_bits(final_model(again), final_model(whole))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"resume": "nobody"}, "resume = nobody: there is no run in .*nobody: give one's name"),
        ({"resume": "part", "lr": 0.5}, "resume = part: lr = 0.5, but the run has 0.01: leave it out"),
        ({"resume": "part", "name": "x"}, "resume = part: name = x, but the run has part: leave it out"),
        ({"resume": "alone"}, "resume = alone: .*alone is no run of LocalSGD"),
        ({"resume": "../part"}, "resume = '../part' is not a plain folder name"),
    ],
)
def test_resume_of_what_is_not_there_or_differs_is_an_error(run: Execute, keys: dict[str, Any], message: str) -> None:
    part = run(name="part", stop_after_rounds=1)
    run("centralized", name="alone", stop_after_epochs=1.0)
    with pytest.raises(UserError, match=message):
        resumed(Config().changed({"results-dir": str(part.folder.parent), **keys}))


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
