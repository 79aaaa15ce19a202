"""A deployed federation whose parts are killed in the middle of a round: real processes, TLS, authentication.

Every test ends with the arrays of the undisturbed run, or says who was missing. Each takes one to three minutes, most
of them Flower's: it takes a killed node or client for alive for a minute.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedsim.config import Config
from fedsim.device import resolve
from fedsim.experiments.execute import execute
from fedsim.federation.flwr_run import copy_app
from fedsim.federation.protocol import MEMORY_LOST
from fedsim.runs.records import read_rows
from tests.conftest import SMALL, assert_same_bits, final_model, rows_of
from tests.federation.processes import BIN, Running, Started, end, running

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

NODES = 4
Begin = Callable[..., "Trial"]
KEYS = {**SMALL, "rounds": 5, "checkpoint-every": 1, "schedule": "cosine"}
PATIENCE = 400


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="module")
def federation(place: Path) -> Iterator[Running]:
    copy_app(place / "app")
    (place / "results").mkdir()
    with running(place / "federation", NODES) as here:
        yield here


@pytest.fixture(scope="module")
def whole(place: Path, federation: Running) -> Path:
    """The undisturbed run, in this process."""
    config = Config().changed({**KEYS, "results-dir": str(place / "results"), "name": "whole"})
    return execute(resolve(config, "localsgd"), "localsgd").folder


class Trial:
    """A run on the federation by ``flwr run``, to be disturbed."""

    def __init__(self, here: Running, place: Path, name: str, results: str = "results", **keys: Any) -> None:
        self.here, self.app, self.results, self.name = here, place / "app", place / results, name
        self.folder, self.log = self.results / name, place / f"{name}.log"
        self.began = time.monotonic()
        self.start({**KEYS, "name": name, **{key.replace("_", "-"): value for key, value in keys.items()}})

    def start(self, keys: dict[str, Any]) -> None:
        overrides = {**keys, "results-dir": str(self.results)}
        words = " ".join(f"{name}={json.dumps(value)}" for name, value in overrides.items())
        command = [f"{BIN}/flwr", "run", str(self.app), "federation", "--stream", "-c", words]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=self.here.env, stdout=log, stderr=log)

    def resume(self, **keys: Any) -> None:
        """As the documentation says: name the run to resume, and give no key that shapes its result."""
        self.process.wait(60)
        self.start({"resume": self.name, **{key.replace("_", "-"): value for key, value in keys.items()}})

    def rounds(self) -> int:
        return len(read_rows(self.folder)) if self.folder.exists() else 0

    def in_the_middle_of_round(self, round: int, part: Callable[[], psutil.Process | None]) -> psutil.Process:
        """The process `part`, once the rounds before `round` are finished and it has begun to work."""
        self.wait(lambda: self.rounds() >= round - 1)
        self.wait(lambda: part() is not None)
        process = part()
        assert process is not None
        return process

    def finished(self) -> None:
        """Wait for its end; print how long the whole took."""
        self.wait((self.folder / "summary.json").exists)
        self.process.wait(60)
        print(f"{self.name}: {time.monotonic() - self.began:.0f} s in all")

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.1)


@pytest.fixture
def begin(federation: Running, place: Path) -> Iterator[Begin]:
    """Begins a run of this name and with these keys; whatever becomes of the test, its ``flwr run`` is ended."""
    trials: list[Trial] = []

    def begin_trial(name: str, **keys: Any) -> Trial:
        trials.append(Trial(federation, place, name, **keys))
        return trials[-1]

    yield begin_trial
    for trial in trials:
        end(trial.process)


def app_of(one: Started, name: str) -> Callable[[], psutil.Process | None]:
    """The process of a ServerApp or ClientApp that a SuperLink or SuperNode has started."""

    def find() -> psutil.Process | None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(one.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if any(name in word for word in process.cmdline()):
                        return process
        return None

    return find


def assert_undisturbed(trial: Trial, whole: Path) -> None:
    assert_same_bits(final_model(trial.folder), final_model(whole))
    assert rows_of(trial.folder) == rows_of(whole)


def test_kill_of_a_supernode(begin: Begin, federation: Running, whole: Path) -> None:
    """It comes back without its momentum: all clients go back to the last checkpoint."""
    trial = begin("supernode", min_clients=NODES)
    node = federation.nodes[2]
    trial.in_the_middle_of_round(3, app_of(node, "flwr-clientapp"))
    node.kill()
    node.join()
    trial.finished()
    assert_undisturbed(trial, whole)


def test_kill_of_a_client_process(begin: Begin, federation: Running, whole: Path) -> None:
    """Its SuperNode keeps the momentum: the round is taken again."""
    trial = begin("client", min_clients=NODES)
    trial.in_the_middle_of_round(3, app_of(federation.nodes[1], "flwr-clientapp")).kill()
    trial.finished()
    assert_undisturbed(trial, whole)


def test_kill_of_the_server_app(begin: Begin, federation: Running, whole: Path) -> None:
    trial = begin("serverapp")
    trial.in_the_middle_of_round(3, app_of(federation.nodes[0], "flwr-clientapp"))
    trial.in_the_middle_of_round(3, app_of(federation.link, "flwr-serverapp")).kill()
    before = trial.rounds()
    trial.resume()
    trial.finished()
    assert before >= 2
    assert_undisturbed(trial, whole)


def test_a_straggler_is_not_waited_for_and_its_late_reply_changes_nothing(begin: Begin, federation: Running) -> None:
    trial = begin("straggler", round_timeout=25.0)
    slow = trial.in_the_middle_of_round(2, app_of(federation.nodes[3], "flwr-clientapp"))
    slow.send_signal(signal.SIGSTOP)
    trial.wait(lambda: trial.rounds() >= 2)
    slow.send_signal(signal.SIGCONT)
    trial.finished()
    rows = rows_of(trial.folder)
    assert rows[0]["left_out"] == {}
    assert rows[1]["left_out"] == {"3": "it did not answer"}
    assert rows[1]["bytes_up"] - rows[0]["bytes_up"] == rows[0]["bytes_up"] * 3 // 4
    assert rows[-1]["left_out"] == {}  # and it takes part again
    # Five checkpoints with the momentum of all four, which is as large as an update, and its late update
    assert read_rows(trial.folder)[-1]["overhead_bytes_up"] >= rows[0]["bytes_up"] // 4 * (5 * NODES + 1)


def test_kill_of_a_supernode_that_the_round_can_do_without(begin: Begin, federation: Running) -> None:
    trial = begin("without", min_clients=NODES - 1, rounds=9)
    node = federation.nodes[0]
    trial.in_the_middle_of_round(2, app_of(node, "flwr-clientapp"))
    node.kill()
    trial.wait(lambda: trial.rounds() >= 3)
    node.join()
    trial.finished()
    rows = rows_of(trial.folder)
    missing = [row["left_out"].get("0") for row in rows]
    assert missing[0] is None
    assert missing[1] == "it did not answer"
    assert set(missing[2:]) <= {None, "it did not answer", "its node is not connected", MEMORY_LOST}
    assert [row["left_out"].keys() <= {"0"} for row in rows] == [True] * 9


def test_a_servers_disk_is_full(begin: Begin, place: Path, whole: Path) -> None:
    """A checkpoint is 1.2 MB: the second one finds no room."""
    disk = place / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1900k", "none", str(disk)], check=False).returncode:
        pytest.skip("no mounts can be made here")
    try:
        trial = begin("full", results=disk.name)
        trial.wait(lambda: trial.process.poll() is not None)
        assert "cannot be written (No space left on device)" in trial.log.read_text()
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        trial.resume()
        trial.finished()
        assert_undisturbed(trial, whole)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_servers_folder_can_no_longer_be_written(begin: Begin, federation: Running, whole: Path) -> None:
    trial = begin("locked")
    trial.in_the_middle_of_round(3, app_of(federation.nodes[0], "flwr-clientapp"))
    if subprocess.run(["chattr", "+i", str(trial.folder)], check=False).returncode:
        pytest.skip("no folder can be locked here")
    try:
        trial.wait(lambda: trial.process.poll() is not None)
    finally:
        subprocess.run(["chattr", "-i", str(trial.folder)], check=True)
    assert "cannot be written (Operation not permitted)" in trial.log.read_text()
    trial.resume()
    trial.finished()
    assert_undisturbed(trial, whole)


def test_kill_of_the_superlink(begin: Begin, federation: Running, whole: Path) -> None:
    """The server app dies with it; the nodes find it again."""
    trial = begin("superlink")
    trial.in_the_middle_of_round(3, app_of(federation.nodes[0], "flwr-clientapp"))
    federation.link.kill()
    before = trial.rounds()
    federation.link.start()
    federation.wait_until_healthy()
    trial.resume()
    trial.finished()
    assert before >= 2
    assert_undisturbed(trial, whole)
