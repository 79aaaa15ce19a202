from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies

import fedsim
from fedsim.config import Config, Mode
from fedsim.device import resolve
from fedsim.errors import RunFailed, UserError
from fedsim.experiments.execute import execute
from fedsim.runs.checkpoint_file import parse_checkpoint, seal, serialize
from fedsim.runs.folder import config_of_run, default_name, is_locked
from fedsim.runs.records import read_rows, read_summary
from fedsim.runs.run import Run
from fedsim.system.files import atomic_write
from fedsim.system.provenance import provenance
from tests.conftest import SMALL, TIMES, Execute, assert_same_bits, final_model, rows_of

MODES: tuple[Mode, ...] = ("localsgd", "centralized")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with contextlib.suppress(RuntimeError), atomic_write(path) as file:
        file.write(b"half of what was to co")
        raise RuntimeError
    assert path.read_bytes() == b"before"
    with atomic_write(path) as file:
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


def test_a_run_that_met_its_epochs_by_an_older_rule_is_not_continued_by_the_present_one(run: Execute) -> None:
    first = run(name="older", stop_after_rounds=2)
    path = first.folder / "config.json"
    config = json.loads(path.read_text())
    config["budget"] = "to a round"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"holds a run of another configuration \(budget = to a round, not to a step\)"):
        run(name="older")


def test_what_does_not_shape_the_result_may_change(run: Execute) -> None:
    run(name="same", stop_after_rounds=2)
    assert run(name="same", checkpoint_every=3).finished


def test_a_folder_that_is_no_runs_is_refused_and_kept(small: Config, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="mine is not empty and not the folder of a run"):
        Run(small.changed({"name": "mine"}), "localsgd")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_results_dir_that_cannot_be_written_is_named(small: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"results-dir = .*file cannot be written"):
        Run(small.changed({"results-dir": str(tmp_path / "file")}), "localsgd")


def test_a_run_that_another_process_runs_is_refused(run: Execute) -> None:
    first = run(name="busy", stop_after_rounds=1)
    with first.lock(), pytest.raises(UserError, match="another process is running it"):
        run(name="busy")
    assert run(name="busy").finished


def test_who_has_patience_waits_for_another_process(run: Execute) -> None:
    first = run(name="busy", stop_after_rounds=1)
    with contextlib.ExitStack() as holding:
        holding.enter_context(first.lock())
        threading.Timer(0.5, holding.close).start()
        with first.lock(patience=60):
            pass
    with first.lock(), pytest.raises(UserError, match="another process is running it"), first.lock(patience=0.2):
        pass


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@contextlib.contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Context manager: raise TimeoutError where something waits for longer."""

    def end(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def of_version_2(path: Path) -> None:
    """It was a zip file and nothing more."""
    torch.save({**torch.load(path, weights_only=True), "version": 2}, path)


def rewrite(path: Path, **changes: Any) -> None:
    """Replace these entries of a checkpoint, as fedsim itself would write it; None removes one."""
    state = {**torch.load(path, weights_only=True), **changes}
    content = serialize({name: value for name, value in state.items() if value is not None})
    path.write_bytes(bytes(content) + seal(content))


def of_another_version(path: Path) -> None:
    rewrite(path, version=99)


def of_another_configuration(path: Path) -> None:
    rewrite(path, config={**torch.load(path, weights_only=True)["config"], "lr": 0.5})


def without_a_model(path: Path) -> None:
    rewrite(path, arrays=None, model=None)


def of_no_round(path: Path) -> None:
    rewrite(path, round="third")


def of_a_round_beyond_the_run(path: Path) -> None:
    rewrite(path, round=99)


def of_another_model(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    name = "arrays" if "arrays" in state else "model"
    rewrite(path, **{name: {key: torch.zeros(3) for key in state[name]}})


def row_lost(path: Path) -> None:
    rows = path.with_name("metrics.jsonl")
    rows.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[:-1]))


def row_changed(path: Path) -> None:
    rows = path.with_name("metrics.jsonl")
    first, last = rows.read_bytes().rsplit(b'"test_accuracy": 0.', 1)
    rows.write_bytes(first + b'"test_accuracy": 0.9' + last[1:])


def row_of_nul_bytes(path: Path) -> None:
    rows = path.with_name("metrics.jsonl")
    kept = b"".join(rows.read_bytes().splitlines(keepends=True)[:-1])
    rows.write_bytes(kept.ljust(rows.stat().st_size, b"\0"))


REFUSED: dict[Callable[[Path], None], str] = {
    cut: "checkpoint.pt is damaged",
    empty: "checkpoint.pt is damaged",
    flipped: "checkpoint.pt is damaged",
    a_directory: r"checkpoint.pt cannot be read (Is a directory)",
    of_version_2: "checkpoint.pt is of another version of fedsim",
    of_another_version: "checkpoint.pt is of another version of fedsim",
    of_another_configuration: "checkpoint.pt is of another configuration",
    without_a_model: "checkpoint.pt does not fit the run: it has no ",
    of_no_round: "checkpoint.pt does not fit the run: round is not valid: ",
    of_a_round_beyond_the_run: "checkpoint.pt is of round 99, of a run of ",
    of_another_model: "checkpoint.pt does not fit the run: in ",
    row_lost: "checkpoint.pt and metrics.jsonl disagree: the rows up to round ",
    row_changed: "checkpoint.pt and metrics.jsonl disagree: the rows up to round ",
    row_of_nul_bytes: "checkpoint.pt and metrics.jsonl disagree: the rows up to round ",
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """In each mode a run of four epochs, and the same one stopped after three, with a checkpoint in each round."""
    place = tmp_path_factory.mktemp("begun")
    config = Config().changed({**SMALL, "results-dir": str(place), "epochs": 4.0, "dataset.images": 64})
    for mode in MODES:
        resolved = resolve(config, mode)
        execute(resolved.changed({"name": f"whole-{mode}"}), mode)
        part = {"name": f"part-{mode}", "checkpoint-every": 1, "stop-after-epochs": 3.0}
        execute(resolved.changed(part), mode)
    return config


def copy_of_part(begun: Config, mode: Mode, results: Path) -> Config:
    """The configuration of a copy of the stopped run in `results`."""
    shutil.copytree(Path(begun.results_dir) / f"part-{mode}", results / "part", dirs_exist_ok=True)
    return resolve(begun.changed({"results-dir": str(results), "name": "part", "checkpoint-every": 1}), mode)


def assert_as_undisturbed(begun: Config, mode: Mode, folder: Path) -> None:
    whole = Path(begun.results_dir) / f"whole-{mode}"
    assert_same_bits(final_model(folder), final_model(whole))
    assert rows_of(folder) == rows_of(whole)
    summaries = [read_summary(place) or {} for place in (folder, whole)]
    assert summaries[0]["best_test_accuracy"] == summaries[1]["best_test_accuracy"]


@pytest.mark.parametrize(
    ("mode", "spoil"),
    [
        *(("localsgd", spoil) for spoil in REFUSED),
        *(("centralized", spoil) for spoil in (cut, without_a_model, of_another_model, row_lost)),
    ],
)
def test_the_checkpoint_before_a_refused_one_is_used(
    begun: Config, tmp_path: Path, mode: Mode, spoil: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = copy_of_part(begun, mode, tmp_path), tmp_path / "part"
    spoil(folder / "checkpoint.pt")
    spoilt = {name: contents(folder / name) for name in ("checkpoint.pt", "metrics.jsonl")}
    used = torch.load(folder / "checkpoint-before.pt", weights_only=True)["round"]
    execute(config, mode)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {folder}/{REFUSED[spoil]}")
    assert line.endswith(f": the previous one, of round {used}, is used")
    assert contents(folder / "checkpoint-refused.pt") == spoilt["checkpoint.pt"]
    assert contents(folder / "metrics-refused.jsonl") == spoilt["metrics.jsonl"]
    assert_as_undisturbed(begun, mode, folder)


def failure_of(attempt: Callable[[], object]) -> str:
    """The message that it fails with, or nothing; any other exception is one of the test."""
    try:
        attempt()
    except (UserError, RunFailed) as error:
        return str(error)
    return ""


def contents(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


@pytest.mark.parametrize("spoil", REFUSED)
def test_with_no_other_checkpoint_a_refused_one_is_an_error(
    begun: Config, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    config, folder = copy_of_part(begun, "localsgd", tmp_path), tmp_path / "part"
    (folder / "checkpoint-before.pt").unlink()
    spoil(folder / "checkpoint.pt")
    before = {path: contents(path) for path in folder.iterdir()}
    with pytest.raises(UserError, match=re.escape(REFUSED[spoil])) as caught:
        execute(config, "localsgd")
    assert str(caught.value).endswith("give --rerun to run it again, or another --name")
    assert "\n" not in str(caught.value)
    assert {path: contents(path) for path in folder.iterdir()} == before
    if spoil in (cut, row_lost):
        execute(config, "localsgd", rerun=True)
        assert_as_undisturbed(begun, "localsgd", folder)


def of_another_optimizer(path: Path) -> dict[str, Any]:
    """Its values are fewer than those of the parameters, which would be read beyond their end."""
    return {"optimizer": {name: torch.zeros(1) for name in torch.load(path, weights_only=True)["optimizer"]}}


@pytest.mark.parametrize(
    ("mode", "changes", "problem"),
    [
        ("localsgd", {"seconds": math.nan}, "seconds is not valid: "),
        ("localsgd", {"own_data": [1]}, "own_data is not valid: "),
        ("localsgd", {"code_changed_after": 5}, "code_changed_after is not valid: "),
        ("localsgd", {"last_aggregated_round": [0]}, "last_aggregated_round is not valid: "),
        ("localsgd", {"memories": {0: 5}}, "memories is not valid: "),
        ("localsgd", {"losses": [("a", "b")]}, "losses is not valid: "),
        ("localsgd", {"failures": {0: "often"}}, "failures is not valid: "),
        ("localsgd", {"sent_up": -1}, "sent_up is not valid: "),
        ("centralized", {"optimizer": {}}, "in optimizer, it has no "),
        ("centralized", of_another_optimizer, "in optimizer, "),
    ],
)
def test_a_checkpoint_with_what_no_run_has_written_is_an_error(
    begun: Config, tmp_path: Path, mode: Mode, changes: Any, problem: str
) -> None:
    config, folder = copy_of_part(begun, mode, tmp_path), tmp_path / "part"
    (folder / "checkpoint-before.pt").unlink()
    path = folder / "checkpoint.pt"
    rewrite(path, **(changes(path) if callable(changes) else changes))
    before = {each: contents(each) for each in folder.iterdir()}
    with pytest.raises(UserError, match=re.escape(f"checkpoint.pt does not fit the run: {problem}")) as caught:
        execute(config, mode)
    assert "\n" not in str(caught.value)
    assert {each: contents(each) for each in folder.iterdir()} == before


@pytest.mark.parametrize("change", ["first row lost", "doubled", "reordered"])
def test_rows_that_no_checkpoint_was_saved_with_are_an_error(begun: Config, tmp_path: Path, change: str) -> None:
    config, path = copy_of_part(begun, "localsgd", tmp_path), tmp_path / "part" / "metrics.jsonl"
    first, second, *rest = path.read_bytes().splitlines(keepends=True)
    rows = {"first row lost": [second], "doubled": [first, first, second], "reordered": [second, first]}[change]
    path.write_bytes(b"".join(rows + rest))
    before = {path: contents(path) for path in path.parent.iterdir()}
    with pytest.raises(UserError, match=r"checkpoint.pt and metrics.jsonl disagree.*before.pt and metrics.jsonl dis"):
        execute(config, "localsgd")
    assert {path: contents(path) for path in path.parent.iterdir()} == before


def test_rows_after_the_checkpoint_are_dropped(begun: Config, tmp_path: Path) -> None:
    config, path = copy_of_part(begun, "localsgd", tmp_path), tmp_path / "part" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() * 2 + b'{"round": 4, "ep')
    execute(config, "localsgd")
    assert_as_undisturbed(begun, "localsgd", tmp_path / "part")


def test_rows_that_change_during_a_run_end_it(small: Config) -> None:
    run = Run(small.changed({"name": "run"}), "localsgd")
    run.log_row({"round": 1, "test_accuracy": 0.1})
    run.save_checkpoint({"round": 1})
    run.log_row({"round": 2, "test_accuracy": 0.2})
    before = contents(run.folder / "checkpoint.pt")
    rows = run.folder / "metrics.jsonl"
    rows.write_bytes(rows.read_bytes().replace(b"0.1", b"0.9"))
    os.utime(rows, (1, 1))  # the clock of older file systems may not have gone on since the last row
    with pytest.raises(RunFailed, match=r"metrics.jsonl was changed during the run: restore its rows"):
        run.save_checkpoint({"round": 2})
    with pytest.raises(RunFailed, match=r"metrics.jsonl was changed during the run"):
        run.write_summary(True, 1, "cpu")
    assert contents(run.folder / "checkpoint.pt") == before
    assert not (run.folder / "summary.json").exists()


def bytes_read() -> int:
    """How many bytes this process has read so far."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


def test_a_checkpoint_reads_no_row_again_however_many_there_are(small: Config) -> None:
    """Not those since the run was resumed, nor those before; at the end all are read once."""
    config = small.changed({"name": "run"})
    run = Run(config, "localsgd")
    run.resume(9, {})
    run.log_row({"round": 1, "test_accuracy": 0.1, "note": "x" * 10**6})
    run.save_checkpoint({"round": 1})
    resumed = Run(config, "localsgd")
    assert resumed.resume(9, {})
    for round_, accuracy in ((2, 0.3), (3, 0.2)):
        resumed.log_row({"round": round_, "test_accuracy": accuracy, "note": "x" * 10**6})
        before = bytes_read()
        resumed.save_checkpoint({"round": round_})
        assert bytes_read() - before < 10**6
    saved = parse_checkpoint((run.folder / "checkpoint.pt").read_bytes())
    content = (run.folder / "metrics.jsonl").read_bytes()
    assert (saved["rows_bytes"], saved["rows_sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    before = bytes_read()
    resumed.save_model({})
    resumed.write_summary(True, 1, "cpu")
    assert bytes_read() - before > 3 * 10**6
    summary = read_summary(run.folder)
    assert summary
    assert (summary["best_test_accuracy"], summary["final_test_accuracy"], summary["round"]) == (0.3, 0.2, 3)


def spoil_model(folder: Path) -> None:
    flipped(folder / "model.pt")


def spoil_rows(folder: Path) -> None:
    row_changed(folder / "checkpoint.pt")


def spoil_summary(folder: Path) -> None:
    path = folder / "summary.json"
    path.write_text(path.read_text().replace('"best_test_accuracy": 0.', '"best_test_accuracy": 0.9'))


def spoil_parameters(folder: Path) -> None:
    path = folder / "summary.json"
    path.write_text(path.read_text().replace('"parameters": 6', '"parameters": 7'))


def remove_rows(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()


@pytest.mark.parametrize("spoil", [spoil_model, spoil_rows, spoil_summary, spoil_parameters, remove_rows])
def test_a_finished_run_whose_records_disagree_is_an_error(
    begun: Config, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    shutil.copytree(Path(begun.results_dir) / "whole-localsgd", tmp_path / "whole")
    config = resolve(begun.changed({"results-dir": str(tmp_path), "name": "whole"}), "localsgd")
    assert execute(config, "localsgd").finished
    spoil(tmp_path / "whole")
    with pytest.raises(
        UserError, match=r"(pt|jsonl) is not what summary.json was written with|summary.json is damaged"
    ):
        execute(config, "localsgd")


def test_a_missing_model_of_a_finished_run_is_reported(
    begun: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(Path(begun.results_dir) / "whole-localsgd", tmp_path / "whole")
    config = resolve(begun.changed({"results-dir": str(tmp_path), "name": "whole"}), "localsgd")
    (tmp_path / "whole" / "model.pt").unlink()
    assert execute(config, "localsgd").finished
    told = capsys.readouterr().err
    assert told == f"warning: {tmp_path}/whole/model.pt is missing: give --rerun to run it again\n"


def test_a_finished_run_of_an_older_fedsim_is_left_alone(begun: Config, tmp_path: Path) -> None:
    shutil.copytree(Path(begun.results_dir) / "whole-localsgd", tmp_path / "whole")
    path = tmp_path / "whole" / "summary.json"
    summary = json.loads(path.read_text())
    del summary["sha256"]
    path.write_text(json.dumps(summary))
    for older in (path, tmp_path / "whole" / "metrics.jsonl"):
        older.write_text(older.read_text().replace("steps_done", "local_steps"))
    (tmp_path / "whole" / "model.pt").unlink()
    config = resolve(begun.changed({"results-dir": str(tmp_path), "name": "whole"}), "localsgd")
    assert execute(config, "localsgd").finished


def test_killed_between_two_checkpoints_the_older_is_used(run: Execute) -> None:
    """The new one is written after the last one has been put aside."""
    part = run(name="part", checkpoint_every=2, stop_after_rounds=4)
    (part.folder / "checkpoint.pt").unlink()
    assert_same_bits(final_model(run(name="part")), final_model(run(name="whole")))


def test_resume_takes_what_shapes_the_result_from_the_run(run: Execute, small: Config) -> None:
    whole = run(name="whole", lr=0.03, local_steps=3)
    run(name="part", lr=0.03, local_steps=3, stop_after_rounds=2)
    bare = Config(results_dir=small.results_dir, resume="part")
    config = resolve(config_of_run(bare), "localsgd")
    with pytest.raises(UserError, match="it was trained by another engine: give --engine local"):
        execute(config, "localsgd", "stacked")
    again = execute(config, "localsgd", "local")
    assert again.folder.name == "part"
    assert_same_bits(final_model(again), final_model(whole))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"resume": "nobody"}, "resume = nobody: there is no run in .*nobody: give one's name"),
        ({"resume": "part", "lr": 0.5}, "resume = part: lr = 0.5, but the run has 0.01: leave it out"),
        ({"resume": "part", "name": "x"}, "resume = part: name = x, but the run has part: leave it out"),
        ({"resume": "alone"}, "resume = alone: .*alone is not a run of LocalSGD"),
        ({"resume": "../part"}, "resume = '../part' is not a plain folder name"),
    ],
)
def test_resume_of_what_is_not_there_or_differs_is_an_error(run: Execute, keys: dict[str, Any], message: str) -> None:
    part = run(name="part", stop_after_rounds=1)
    run("centralized", name="alone", stop_after_epochs=1.0)
    with pytest.raises(UserError, match=message):
        config_of_run(Config().changed({"results-dir": str(part.folder.parent), **keys}))


JUNK = {
    "cut": b'{"mode": "loc',
    "empty": b"",
    "binary": b"\xff\xfe\x00\x01",
    "NULs": b"\0" * 100,
    "list": b"[]",
    "nested": b"[" * 100_000,
    "object": b"{}",
    "types": b'{"mode": ["localsgd"], "finished": "yes", "round": {}}',
}


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_a_damaged_file_of_a_run_is_named(begun: Config, tmp_path: Path, name: str, junk: str) -> None:
    config, path = copy_of_part(begun, "localsgd", tmp_path), tmp_path / "part" / name
    path.write_bytes(JUNK[junk])
    with pytest.raises(UserError, match=rf"{name} is damaged.*: restore it, or") as caught:
        execute(config, "localsgd")
    assert "\n" not in str(caught.value)
    if name == "config.json":
        with pytest.raises(UserError, match=r"config.json is damaged"):
            config_of_run(Config(results_dir=str(tmp_path), resume="part"))


@pytest.mark.parametrize(("key", "value"), [("lr", "fast"), ("clients", [4]), ("spam\nspam", 1), ("model", None)])
def test_a_configuration_to_resume_that_is_none_is_named(begun: Config, tmp_path: Path, key: str, value: Any) -> None:
    copy_of_part(begun, "localsgd", tmp_path)
    path = tmp_path / "part" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(
        UserError, match=r"config.json( is not the configuration of a run|: its key spam spam is of another version)"
    ) as caught:
        config_of_run(Config(results_dir=str(tmp_path), resume="part"))
    assert "\n" not in str(caught.value)


FILES = ("config.json", "metrics.jsonl", "checkpoint.pt", "checkpoint-before.pt", "model.pt", "summary.json", ".lock")


@pytest.mark.parametrize(
    ("what", "replaced"),
    [(a_directory, ["checkpoint.pt"]), (a_fifo, ["checkpoint.pt", "checkpoint-before.pt", "model.pt"])],
)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_in_the_place_of_one_is_one_line_or_no_matter(
    begun: Config, tmp_path: Path, name: str, what: Callable[[Path], None], replaced: list[str]
) -> None:
    """No process waits for the other end of a FIFO."""
    config, path = copy_of_part(begun, "localsgd", tmp_path), tmp_path / "part" / name
    what(path)
    with ended_after(60):
        failure = failure_of(lambda: execute(config, "localsgd"))
        is_locked(path.parent)
    if name in replaced:
        assert failure == ""
        assert_as_undisturbed(begun, "localsgd", path.parent)
    else:
        assert str(path.parent) in failure
        assert "\n" not in failure


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"results-dir": "~nobody-of-this-name/results"}, "results-dir = '~nobody.* begins with another user"),
        ({"name": "n" * 300}, "name = .* more than 255 bytes"),
    ],
)
def test_a_folder_that_cannot_be_is_named(small: Config, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Run(small.changed(keys), "localsgd")


def test_a_results_dir_that_cannot_be_entered_is_named(tmp_path: Path) -> None:
    (tmp_path / "results" / "run").mkdir(parents=True)
    (tmp_path / "results").chmod(0)
    user = os.geteuid()
    if user == 0:  # root may enter every folder
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=r"cannot be written \(Permission denied\): give another --results-dir"):
            Run(Config(results_dir=str(tmp_path / "results"), name="run"), "localsgd")
    finally:
        os.seteuid(user)
        (tmp_path / "results").chmod(0o700)


def test_what_a_killed_process_left_is_removed_and_its_folder_accepted(run: Execute, tmp_path: Path) -> None:
    """Killed before config.json, or in the middle of a checkpoint."""
    folder = tmp_path / "killed"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".config.json.12345").write_text("{")
    run(name="killed", stop_after_rounds=1)
    for name in (".checkpoint.pt.12345", ".metrics.jsonl.1", ".model.pt.23", ".summary.json.7"):
        (folder / name).write_bytes(b"half")
    (folder / ".notes.12").write_text("not ours")
    run(name="killed", stop_after_rounds=2)
    expected = {".lock", ".notes.12", "config.json", "metrics.jsonl", "checkpoint.pt", "checkpoint-before.pt"}
    assert {path.name for path in folder.iterdir()} == expected | {"model.pt", "summary.json"}


@pytest.mark.parametrize("row", [b'{"rou', b"\xff", b"[]", b"\0\0", b"[" * 100_000])
def test_only_a_last_row_may_be_damaged(tmp_path: Path, row: bytes) -> None:
    rows = tmp_path / "metrics.jsonl"
    rows.write_bytes(b'{"round": 1}\n' + row)
    assert read_rows(tmp_path) == [{"round": 1}]
    rows.write_bytes(b'{"round": 1}\n' + row + b'\n{"round": 3}\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        read_rows(tmp_path)


json_values = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(), inner, max_size=3),
    max_leaves=5,
)
KEYS = ["mode", "lr", "finished", "seconds", "sha256", "best_test_accuracy", "round", "test_accuracy", "name"]
json_objects = strategies.dictionaries(strategies.sampled_from(KEYS) | strategies.text(), json_values, max_size=5)
file_contents = strategies.binary(max_size=60) | strategies.one_of(json_values, json_objects).map(
    lambda value: json.dumps(value).encode()
)


@settings(derandomize=True, max_examples=25 * TIMES, deadline=None, database=None)
@given(strategies.sampled_from(["config.json", "summary.json", "metrics.jsonl", "checkpoint.pt"]), file_contents)
def test_any_content_of_a_runs_files_is_understood_or_one_line(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as results:
        config = Config(results_dir=results, name="run", resume="")
        folder = Run(config, "localsgd").folder
        path = folder / name
        known = path.read_bytes() if name == "config.json" else b"{}"
        with contextlib.suppress(ValueError):  # an object among what a run has there, or alone
            if isinstance(held := json.loads(content), dict):
                content = json.dumps({**json.loads(known), **held}).encode()
        path.write_bytes(content)

        def read() -> None:
            config_of_run(Config(results_dir=results, resume="run"))

        def resume() -> None:
            run = Run(config, "localsgd")
            with run.lock():
                if run.finished:
                    run.check_outputs()
                run.resume(8, {"model": {}})

        for attempt in (read, resume):
            assert "\n" not in failure_of(attempt)


def test_numbers_that_are_not_finite_become_null(small: Config) -> None:
    run = Run(small.changed({"name": "inf"}), "localsgd")
    run.log_row({"round": 1, "test_loss": float("inf"), "train_loss": 1.5})
    assert json.loads((run.folder / "metrics.jsonl").read_text())["test_loss"] is None


def test_names_tell_configurations_apart_but_not_machines() -> None:
    config = Config()
    assert default_name(config, "localsgd").startswith("localsgd-sgdm-b64-k4-j10-seed2025-")
    assert default_name(config, "localsgd") != default_name(config.changed({"lr": 0.5}), "localsgd")
    assert default_name(config, "localsgd") == default_name(config.changed({"device": "cpu", "threads": 7}), "localsgd")
    assert default_name(config, "centralized") == default_name(config.changed({"clients": 7}), "centralized")
    everything = hashlib.sha256(b"{}").hexdigest()[:6]  # keys with their default are no part of it
    assert default_name(Config(), "localsgd") == f"localsgd-sgdm-b64-k4-j10-seed2025-{everything}"


def test_a_package_inside_another_projects_checkout_has_no_commit(tmp_path: Path) -> None:
    package = Path(fedsim.__file__).parent
    shutil.copytree(package / "system", tmp_path / "lib" / "fedsim" / "system")
    for file in package.glob("*.py"):
        shutil.copy(file, tmp_path / "lib" / "fedsim")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, "commit", "-qm", "all"], cwd=tmp_path, check=True)
    code = "from fedsim.system.provenance import origin; print(repr(origin()['commit']))"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "lib")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "''", done


def test_provenance_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_ORIGIN", json.dumps({"commit": "abc", "command": "run.py localsgd"}))
    origin = provenance("cpu")
    assert (origin["commit"], origin["command"]) == ("abc", "run.py localsgd")
    assert {"python", "fedsim", "flwr", "torch"} <= origin["versions"].keys()
