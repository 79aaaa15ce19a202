"""Cells on Ray: a Ray of their own, and a cluster of two nodes on this machine; each bounded in time."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch

import fedsim
from fedsim.cli import commands
from fedsim.config import Config
from fedsim.device import CORES, cpu_count
from fedsim.errors import UserError
from fedsim.experiments.study import Cell
from fedsim.federation.flwr_run import copy_app, free_port
from fedsim.runs.records import read_rows, read_summary
from tests.commands import ROOT, executed, here, run, started
from tests.conftest import assert_same_bits, final_model, rows_of
from tests.experiments.test_tune import TUNED
from tests.federation.processes import end
from tests.federation.test_flwr_run import started_by

GRID = (
    "grid --dataset synthetic:images=256 --model lenet5 --batch-size 16 --clients 1,2 --local-steps 2 "
    "--epochs 2 --device cpu --threads 1"
).split()
FILES = {"config.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "model.pt", ".lock"}


def saved_round(cell: Path) -> int:
    """The round of the last checkpoint; the one before it where a kill came between the two."""
    last, before = cell / "checkpoint.pt", cell / "checkpoint-before.pt"
    return int(torch.load(last if last.exists() else before, weights_only=True)["round"])


def assert_same_grid(one: Path, other: Path) -> None:
    """The same cells with the same rows but for their seconds, and bitwise the same models of those that ended well."""
    names = sorted(path.name for path in one.iterdir() if path.is_dir())
    assert names == sorted(path.name for path in other.iterdir() if path.is_dir())
    assert names
    for name in names:
        assert rows_of(one / name) == rows_of(other / name)
        assert (one / name / "model.pt").exists() == (other / name / "model.pt").exists()
        if (one / name / "model.pt").exists():
            assert_same_bits(final_model(one / name), final_model(other / name))


def other_checkout(folder: Path) -> Path:
    """A copy of fedsim in the new `folder`, of another version; returns its run.py."""
    checkout = copy_app(folder)
    (checkout / "run.py").write_text((ROOT / "run.py").read_text())
    module = checkout / "fedsim" / "__init__.py"
    module.write_text(module.read_text().replace('__version__ = "', '__version__ = "of-another-checkout-'))
    return checkout / "run.py"


def test_a_grid_on_ray_is_the_grid_one_by_one_and_the_cluster_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], node: str
) -> None:
    """By the code of who asks. Two cells fail and are named, and one was finished before."""
    keys = [*GRID, "--lr", "0.01,1e30"]
    with pytest.raises(SystemExit) as ended:
        here(tmp_path, *keys, "--name", "alone")
    failed = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 1
    assert failed.startswith("error: 2 of 4 cells failed: ")
    alone, ray = tmp_path / "results" / "alone", tmp_path / "results" / "ray"
    shutil.copytree(alone / "k2-j2-lr0.01-seed2025", ray / "k2-j2-lr0.01-seed2025")
    before = {path: path.stat().st_mtime_ns for path in ray.rglob("[!.]*.*")}
    program = other_checkout(tmp_path / "other")
    command = [*keys, "--name", "ray", "--ray", node]
    with executed(tmp_path, *command, program=program, PYTHONPATH=str(program.parent)) as process:
        done = process.wait()
    assert done.returncode == 1
    assert done.stderr == failed.replace("alone/", "ray/") + "\n"
    assert "too few usable updates: worker 0: " in done.stdout
    assert_same_grid(alone, ray)
    (cell,) = ray.glob("k1-*-lr0.01-*")
    assert {path.name for path in cell.iterdir()} - {"checkpoint-before.pt"} == FILES
    ours, theirs = (read_summary(folder / cell.name) or {} for folder in (ray, alone))
    assert ours["command"].endswith(f"--name ray --ray {node}")
    assert ours["versions"]["fedsim"].startswith("of-another-checkout-")
    times = dict.fromkeys(("seconds", "date", "sha256"))  # the digest of the rows, which hold their seconds
    differ: dict[str, Any] = {**times, "command": "", "versions": {}, "commit": ""}
    assert {**ours, **differ} == {**theirs, **differ}
    assert (ray / "grid.csv").exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before  # the finished one was skipped
    assert answers(node)


@pytest.mark.slow
def test_a_grid_on_a_ray_of_its_own_leaves_nothing_behind(tmp_path: Path) -> None:
    here(tmp_path, *GRID, "--name", "alone")
    done = run(tmp_path, *GRID, "--name", "ray", "--ray", STARTED_BY=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_grid(tmp_path / "results" / "alone", tmp_path / "results" / "ray")
    assert started_by(str(tmp_path)) == []


def test_the_environment_is_as_it_was_after_a_ray_of_ones_own() -> None:
    """For a cluster that is joined then."""
    from ray._private import ray_constants

    from fedsim.experiments import ray_sweep

    before = dict(os.environ)
    with ray_sweep._private():
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert not ray_constants.ENABLE_RAY_CLUSTER
    assert dict(os.environ) == before
    assert ray_constants.ENABLE_RAY_CLUSTER


@pytest.mark.slow
def test_a_tuned_study_on_ray_chooses_the_same_and_is_tracked(tmp_path: Path, node: str) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    text = TUNED.replace("twins = true", "").replace("clients = [1, 2]", "clients = [2]").replace(", 1e9]", "]")
    (tmp_path / "tuned.toml").write_text(text)
    alone, on_ray = tmp_path / "alone", tmp_path / "on-ray"
    here: Any = {"device": "cpu", "threads": 1, "progress": False}
    fedsim.study(tmp_path / "tuned.toml", results_dir=alone, **here)
    keys = "study tuned.toml --device cpu --threads 1 --results-dir on-ray --track tensorboard"
    done = run(tmp_path, *keys.split(), "--ray", node)
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("tuned/tuning.csv", "tuned/study.toml"):
        assert (on_ray / name).read_text() == (alone / name).read_text()
    assert "lr = 0.05" in (on_ray / "tuned/study.toml").read_text().partition("[chosen")[2]
    assert_same_grid(alone / "tuned", on_ray / "tuned")
    assert_same_grid(alone / "tuned-tuning", on_ray / "tuned-tuning")
    # Of a trial TensorBoard may lose events: it is resumed twice in a second, and files are sorted by their second
    assert all(list(trial.glob("tensorboard/events.*")) for trial in (on_ray / "tuned-tuning").iterdir())
    cell = on_ray / "tuned" / "k2-j2-seed1"
    events = accumulator.EventAccumulator(str(cell / "tensorboard")).Reload()
    seen = [(event.step, pytest.approx(event.value)) for event in events.Scalars("test_accuracy")]
    assert seen == [(row["round"], row["test_accuracy"]) for row in read_rows(cell) if row["test_accuracy"] is not None]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param("--ray 127.0.0.1:1", "ray = 127.0.0.1:1: no Ray cluster answers there", marks=pytest.mark.slow),
        ("--ray --gpus-per-cell 0.5", "gpus-per-cell = 0.5, but device = cpu: give --device cuda"),
        ("--ray --device cuda:1", "device = cuda:1: with --ray it must be cpu or cuda"),
    ],
)
def test_bad_input_for_ray_is_one_line_within_a_minute(
    tmp_path: Path, arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        here(tmp_path, *GRID, *arguments.split())
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (2, 1), error
    assert words in error
    assert time.monotonic() - began < 60
    assert not (tmp_path / "results").exists()


def test_cells_that_no_node_has_room_for_are_one_line(tmp_path: Path, node: str) -> None:
    done = run(tmp_path, *GRID, "--ray", node, "--cpus-per-cell", "4096")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "which no node of the cluster has" in done.stderr
    assert not (tmp_path / "results").exists()


def test_a_ray_of_ones_own_is_private_and_leaves_nothing_behind_when_asked_to_end(tmp_path: Path) -> None:
    """It listens on the loopback interface alone, and asks for its token."""
    keys = [*GRID, "--clients", "1", "--epochs", "10000", "--name", "long", "--ray"]
    with started(tmp_path, *keys, STARTED_BY=str(tmp_path), FEDSIM_CORES="1") as process:
        process.wait_for(lambda: any(read_rows(folder) for folder in (tmp_path / "results" / "long").glob("k*")))
        processes = psutil.Process(process.pid).children(recursive=True)
        assert {"127.0.0.1"} <= listening(processes) <= {"127.0.0.1", "::ffff:127.0.0.1"}
        (raylet,) = (each for each in processes if each.name() == "raylet")
        (address,) = (word.partition("=")[2] for word in raylet.cmdline() if word.startswith("--gcs-address="))
        own = raylet.environ()
        assert answers(address, own)
        assert not answers(address, own | {"RAY_AUTH_TOKEN": "0" * 64})
        process.send_signal(signal.SIGTERM)
        assert process.wait(60).returncode == 143
    assert started_by(str(tmp_path)) == []


def listening(processes: list[psutil.Process]) -> set[str]:
    """The addresses at which they accept connections."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found |= {each.laddr.ip for each in process.net_connections("tcp") if each.status == "LISTEN"}
    return found


@pytest.mark.parametrize(
    ("arguments", "address"),
    [
        ("", None),
        ("--ray", ""),
        ("--ray --rerun", ""),
        ("--ray auto", "auto"),
        ("--ray 10.0.0.1:6379 --rerun", "10.0.0.1:6379"),
        ("--ray=auto", "auto"),
    ],
)
def test_the_address_of_ray_may_be_left_out(arguments: str, address: str | None) -> None:
    assert commands.cli.commands["grid"].make_context("grid", arguments.split()).params["ray"] == address


def test_a_process_with_a_share_of_the_cores_uses_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CORES, "3")
    assert cpu_count() == 3


class Nodes(NamedTuple):
    """A Ray cluster of a CPU each: its address and the processes of its two nodes."""

    address: str
    head: psutil.Process
    other: psutil.Process


SMALL_NODE = ("--block", "--num-cpus", "1", "--object-store-memory", "100000000")


@contextlib.contextmanager
def cluster_of_one() -> Iterator[tuple[str, psutil.Process]]:
    """A cluster that no other finds, as it writes its address to a folder of its own (short: it has sockets)."""
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        home = ["--head", "--port", address.split(":")[1], "--include-dashboard", "false", "--temp-dir", folder]
        with ray_node([*home, *SMALL_NODE], Path(folder)) as head:
            wait_for(lambda: has_raylet(head))
            wait_for(lambda: answers(address))
            yield address, head


@contextlib.contextmanager
def cluster() -> Iterator[Nodes]:
    """A cluster of two nodes."""
    with cluster_of_one() as (address, head), ray_node(["--address", address, *SMALL_NODE], Path("/tmp")) as other:
        wait_for(lambda: has_raylet(other))
        yield Nodes(address, head, other)


@pytest.fixture(scope="module")
def node() -> Iterator[str]:
    """The address of the cluster of the tests that leave it as it is."""
    with cluster_of_one() as (address, head):
        yield address
        kill_node(head)  # it takes seconds to end by itself


@contextlib.contextmanager
def ray_node(arguments: list[str], folder: Path) -> Iterator[psutil.Process]:
    command = [str(Path(sys.executable).with_name("ray")), "start", *arguments]
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, env=env, cwd=folder, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        yield psutil.Process(process.pid)
    finally:
        end(process)


def has_raylet(node: psutil.Process) -> bool:
    return any("raylet" in process.name() for process in node.children(recursive=True))


def answers(address: str, env: Mapping[str, str] = os.environ) -> bool:
    command = [str(Path(sys.executable).with_name("ray")), "health-check", "--address", address]
    return subprocess.run(command, env=env, capture_output=True, timeout=100).returncode == 0


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def runs_of(parent: psutil.Process) -> dict[Path, psutil.Process]:
    """The folders of the runs that the processes below `parent` hold, and which does."""
    held: dict[Path, psutil.Process] = {}
    for process in parent.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            files = [Path(file.path) for file in process.open_files()]
            held |= {file.parent: process for file in files if file.name == ".lock"}
    return held


def kill_node(node: psutil.Process) -> None:
    """As a power cut: all of its processes at once, with no word to the others."""
    for process in [node, *node.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.chaos
def test_a_node_is_killed_in_the_middle_of_a_grid_and_the_grid_completes(tmp_path: Path) -> None:
    keys = [*GRID, "--clients", "1,2", "--local-steps", "1", "--epochs", "6", "--checkpoint-every", "1"]
    here(tmp_path, *keys, "--name", "undisturbed")
    with cluster() as nodes, started(tmp_path, *keys, "--name", "killed", "--ray", nodes.address) as process:
        process.wait_for(lambda: any((folder / "checkpoint.pt").exists() for folder in runs_of(nodes.other)))
        (cell,) = runs_of(nodes.other)
        kill_node(nodes.other)
        reached = saved_round(cell)
        before = read_rows(cell)[:reached]
        assert read_summary(cell) is None  # it was in the middle
        done = process.wait(250)
    assert done.returncode == 0, done.stderr
    assert reached > 0
    assert read_rows(cell)[:reached] == before  # down to their seconds: these rounds were not run again
    assert_same_grid(tmp_path / "results" / "undisturbed", tmp_path / "results" / "killed")


@pytest.mark.chaos
def test_a_cell_whose_process_is_killed_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    keys = [*GRID, "--clients", "2", "--local-steps", "1", "--epochs", "6", "--checkpoint-every", "1"]
    here(tmp_path, *keys, "--name", "undisturbed")
    with started(tmp_path, *keys, "--name", "killed", "--rerun", "--ray") as process:
        cell = tmp_path / "results" / "killed" / "k2-j1-seed2025"
        process.wait_for(lambda: (cell / "checkpoint.pt").exists())
        runs_of(psutil.Process(process.pid))[cell].kill()
        reached = saved_round(cell)
        before = read_rows(cell)[:reached]
        assert read_summary(cell) is None
        done = process.wait(250)
    assert done.returncode == 0, done.stderr
    assert read_rows(cell)[:reached] == before
    assert_same_grid(tmp_path / "results" / "undisturbed", tmp_path / "results" / "killed")


def test_a_node_with_other_code_or_another_folder_refuses_a_cell(small: Config) -> None:
    from fedsim.experiments import ray_sweep as ray_cells

    run_cell: Any = ray_cells._run_cell  # Ray's wrapper of the function
    with pytest.raises(UserError, match=r"the fedsim in .* differs from this command's: use the same commit on both"):
        run_cell._function(Cell((), "localsgd", small), "local", "", 1.0, "other")
    with pytest.raises(UserError, match="is another folder: give one that all nodes share"):
        run_cell._function(Cell((), "localsgd", small), "local", "", 1.0, ray_cells.CODE)


@pytest.mark.slow
def test_results_that_the_nodes_do_not_share_are_refused(tmp_path: Path, node: str) -> None:
    (tmp_path / "driver").mkdir()
    keys = [*GRID, "--results-dir", "/proc/self/cwd/mine", "--ray", node]
    done = run(tmp_path / "driver", *keys)
    assert done.returncode == 2, done.stderr
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))  # Ray may warn beside it
    assert error.endswith("is another folder: give one that all nodes share")


@pytest.mark.slow
def test_flwr_run_on_an_existing_cluster_is_the_run_in_this_process_bitwise(tmp_path: Path) -> None:
    without_epochs = [word for word, before in zip(GRID[1:], GRID, strict=False) if "--epochs" not in (word, before)]
    keys = ["localsgd", *without_epochs, "--clients", "3", "--rounds", "4"]
    here(tmp_path, *keys, "--name", "here")
    seen: set[int] = set()
    over = threading.Event()
    with cluster() as nodes:

        def watch() -> None:
            while not over.wait(0.1):
                for node in (nodes.head, nodes.other):
                    if any("ClientAppActor" in name for name in titles(node)):
                        seen.add(node.pid)

        watcher = threading.Thread(target=watch)
        watcher.start()
        flower = run(tmp_path, *keys, "--name", "flower", "--engine", "flower", RAY_ADDRESS=nodes.address)
        over.set()
        watcher.join()
        assert answers(nodes.address)
    assert flower.returncode == 0, flower.stdout
    assert seen == {nodes.head.pid, nodes.other.pid}  # its clients were on both nodes
    assert rows_of(tmp_path / "results" / "flower") == rows_of(tmp_path / "results" / "here")
    assert_same_bits(final_model(tmp_path / "results" / "flower"), final_model(tmp_path / "results" / "here"))


def titles(node: psutil.Process) -> list[str]:
    """What the processes of `node` call themselves."""
    found = []
    for process in node.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found.append(" ".join(process.cmdline()))
    return found
