"""The app on Flower's own engine: the real ``flwr run``, SuperLink and Ray."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from flwr.cli.build import build_fab_from_disk

import fedsim
from fedsim.config import Config
from fedsim.device import resolve
from fedsim.errors import RunFailed, UserError
from fedsim.experiments.execute import execute
from fedsim.federation import flwr_run
from fedsim.federation.flwr_run import PACKAGES, TOOLS, check_tools, copy_app, federation, superlink
from fedsim.federation.private_superlink import for_own_user
from fedsim.federation.server_app import log_errors_in_one_line
from fedsim.runs.records import read_rows
from fedsim.system.processes import cleanup, marked, running
from tests.commands import ROOT, Done, run, started
from tests.conftest import METHODS, NEEDS_FLWR_DATASETS, RESNET, TEXT, Call, assert_same_bits, final_model, rows_of
from tests.own_code import larger

SMALL = (
    "localsgd --dataset synthetic:images=512 --model lenet-bn --batch-size 16 --clients 3 --local-steps 2 "
    "--rounds 3 --schedule cosine --device cpu --threads 1"
).split()
COMPRESSED_DOWN = (
    *("--compress-down", "powersgd", "--fraction", "0.5", "--outer", "slowmo:momentum=0.6"),
    *("--local-rule", "scaffold", "--optimizer", "adamw"),
)
OWN_CODE = (
    *(
        "--momentum-at-sync",
        "average",
        "--validation",
        "64",
        "--compress",
        "topk",
        "--mean",
        "clipped:weights=shard-size",
    ),
    *(
        "--model",
        "my_code:Views",
        "--dataset",
        "figures.npz",
        "--augment",
        "my_code:erase",
        "--partition",
        "dirichlet:alpha=0.9",
    ),
    *("--local-steps", "10", "--local-epochs", "1", "--clients", "4", "--fraction", "0.75"),
    *("--compress-down", "powersgd", "--outer", "slowmo:momentum=0.6"),
)

TINY = {
    **{"dataset": "synthetic:images=256", "model": "lenet5", "batch-size": 16, "device": "cpu"},
    **{"threads": 2, "clients": 2, "local-steps": 2, "rounds": 2},  # of two cores: one Ray actor
}


def as_flags(keys: Mapping[str, Any]) -> tuple[str, ...]:
    """The flags of `keys`, which have a number of rounds in place of the epochs."""
    given = {name: value for name, value in keys.items() if name != "epochs"}
    return tuple(f"--no-{name}" if value is False else f"--{name}={value}" for name, value in given.items())


def run_py(folder: Path, *arguments: str, **env: str) -> Done:
    """Run ``run.py`` in `folder`."""
    return run(folder, *SMALL, "--results-dir", str(folder), *arguments, **env)


def started_by(mark: str) -> list[str]:
    """The processes that have `mark` in their environment, as all do that were started with it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(OWN_CODE, marks=[NEEDS_FLWR_DATASETS, pytest.mark.slow]),
        pytest.param(COMPRESSED_DOWN, marks=pytest.mark.slow),
        pytest.param(as_flags(RESNET), marks=[NEEDS_FLWR_DATASETS, pytest.mark.slow]),
        *(pytest.param(as_flags(keys), marks=pytest.mark.slow) for keys in [TEXT, *METHODS.values()]),
    ],
    ids=["own-code", "compressed-down", "resnet18", "text", *METHODS],
)
def test_flwr_run_on_ray_is_the_run_in_this_process_bitwise(tmp_path: Path, keys: tuple[str, ...]) -> None:
    """Also with code and data of one's own in the folder in which the command is given, and names of any letters."""
    shutil.copy(ROOT / "tests" / "own_code.py", tmp_path / "my_code.py")
    np.savez(tmp_path / "figures.npz", **larger())  # type: ignore[arg-type]
    path = os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])
    fleet = run_py(tmp_path, "--name", "here", *keys, PYTHONPATH=path)
    assert fleet.returncode == 0, fleet.stderr
    command = [*SMALL, "--results-dir", str(tmp_path), "--name", "😀", *keys, "--engine", "flower"]
    (temporary := tmp_path / "für").mkdir()
    flower = run(tmp_path, *command, STARTED_BY=str(tmp_path), PYTHONPATH=path, TMPDIR=str(temporary))
    assert flower.returncode == 0, flower.stdout
    assert_same_bits(final_model(tmp_path / "😀"), final_model(tmp_path / "here"))
    assert rows_of(tmp_path / "😀") == rows_of(tmp_path / "here")
    assert re.search(r"round +3 ", flower.stdout)  # the log was streamed
    assert started_by(str(tmp_path)) == []  # and the SuperLink is gone


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # of Flower's
def test_the_app_has_every_key_and_all_code_of_fedsim(tmp_path: Path) -> None:
    """It is made from the two packages alone, as they are installed."""
    fab = build_fab_from_disk(copy_app(tmp_path / "app"))
    with zipfile.ZipFile(io.BytesIO(fab)) as archive:
        files = {name for name in archive.namelist() if name.endswith(".py")}
        app = tomllib.loads(archive.read("pyproject.toml").decode())["tool"]["flwr"]["app"]
    assert files == {str(file.relative_to(ROOT)) for name in PACKAGES for file in (ROOT / name).rglob("*.py")}
    assert app["config"] == Config().as_keys()
    of_checkout = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert app["components"] == of_checkout["components"]


def test_without_flowers_commands_nothing_is_begun(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are looked for beside Python, then on PATH."""
    (elsewhere := tmp_path / "bin").mkdir()
    commands = {name: str(Path(sys.executable).with_name(name)) for name in TOOLS}
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(elsewhere))
    code, out, err = call(*SMALL, "--model", "lenet5", "--engine", "flower")
    assert (code, out) == (2, "")
    assert err.startswith(
        f"error: engine = flower needs the command flwr, which is neither in {tmp_path} nor on PATH: "
    )
    assert list(tmp_path.iterdir()) == [elsewhere]
    for name, command in commands.items():
        (elsewhere / name).symlink_to(command)
    check_tools()


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A temporary folder with a short path, as a user's, since Ray keeps sockets in it."""
    with tempfile.TemporaryDirectory(prefix="fs-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    ("number", "most"),
    [(signal.SIGTERM, 4.0), pytest.param(signal.SIGHUP, 12.0, marks=pytest.mark.slow)],
)
def test_a_run_that_is_ended_leaves_no_process_and_no_file(
    tmp_path: Path, temporary: Path, number: signal.Signals, most: float
) -> None:
    """At a random moment, from the start of its SuperLink to its rounds; further signals do not skip the cleanup."""
    command = [*SMALL, "--results-dir", str(tmp_path), "--engine", "flower", "--rounds", "100000"]
    seconds = random.uniform(0, most)
    print(f"ended {seconds:.2f} s after the start of its SuperLink")
    with started(tmp_path, *command, STARTED_BY=str(tmp_path), TMPDIR=str(temporary)) as process:
        process.wait_for(lambda: any("private_superlink" in each for each in started_by(str(tmp_path))))
        time.sleep(seconds)
        process.send_signal(number)
        time.sleep(0.3)
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            process.send_signal(number)
        done = process.wait(100)
    assert done.returncode == 128 + number, done
    assert started_by(str(tmp_path)) == []
    assert list(temporary.iterdir()) == []


OUTLIVES = """
import subprocess, sys
subprocess.Popen(["sleep", "1000"], start_new_session=True)
"""
IGNORES = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.run([sys.executable, "-c", sys.argv[1]])  # its child outlives it
time.sleep(1000)
"""


def names(processes: Iterable[psutil.Process]) -> list[str]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            found.append(process.name())
    return found


def test_processes_end_with_the_block_that_started_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that ignore SIGTERM, that began a session, and that outlived their parent."""
    monkeypatch.setattr("fedsim.system.processes.STOP_SECONDS", 0.5)
    began = [sys.executable, "-c", IGNORES, OUTLIVES]
    with (tmp_path / "log").open("wb") as log, running(began, os.environ, log) as (_, mark):
        while "sleep" not in names(marked(mark)):
            time.sleep(0.05)
        processes = marked(mark)
        assert len(processes) >= 2
    assert marked(mark) == []
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def test_cleanup_is_completed_where_a_signal_interrupts_it() -> None:
    done: list[str] = []

    def clean() -> None:
        if not done:
            done.append("interrupted")
            raise KeyboardInterrupt
        done.append("complete")

    with pytest.raises(KeyboardInterrupt), cleanup(clean):
        pass
    assert done == ["interrupted", "complete"]


@pytest.mark.slow
def test_a_run_whose_processes_have_other_data_is_refused(tmp_path: Path) -> None:
    """By the server app, in one line and with exit code 1."""
    shutil.copy(ROOT / "tests" / "own_code.py", tmp_path / "my_code.py")
    path = os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])
    own = ("--model", "my_code:mlp", "--dataset", "my_code:of_process", "--clients", "2", "--threads", "2")
    refused = run_py(tmp_path, *own, "--name", "run", "--engine", "flower", PYTHONPATH=path)
    assert refused.returncode == 1
    assert "flwr run did not complete (its status: finished:failed)" in refused.stderr
    left_out = r"error: .* Left out: the node with partition-id \d has other train_labels of dataset = "
    assert re.search(left_out, refused.stdout)
    assert "Traceback" not in refused.stdout + refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("model", ["Huge", "HugeInEval"])
def test_memory_that_is_not_there_is_told_in_a_line(tmp_path: Path, model: str) -> None:
    """That of a client on Ray, and that of the server app."""
    shutil.copy(ROOT / "tests" / "own_code.py", tmp_path / "my_code.py")
    path = os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])
    keys = ("--model", f"my_code:{model}", "--clients", "2", "--threads", "2", "--rounds", "1", "--engine", "flower")
    done = run_py(tmp_path, *keys, PYTHONPATH=path)
    assert done.returncode == 1
    assert done.stdout.count("out of memory") == 1
    assert f"error: out of memory: batch-size = 16 and model = my_code:{model} on cpu: give a smaller" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("error", "logged"),
    [
        (UserError("clients = 0: give more"), "error: clients = 0: give more"),
        (RunFailed("no update"), "error: no update"),
        (ValueError("a fault of fedsim"), "Traceback"),
    ],
)
def test_flower_logs_bad_input_in_one_line_and_faults_with_their_traceback(
    error: Exception, logged: str, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("flwr")
    log_errors_in_one_line()
    try:
        logger.addHandler(caplog.handler)
        try:
            raise error
        except Exception as raised:
            logger.error("%s raised an exception", "ServerApp", exc_info=raised)  # as Flower does
        assert logged in caplog.text
        assert ("Traceback" in caplog.text) == (logged == "Traceback")
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.chaos
def test_a_run_whose_ray_actor_is_killed_ends_with_its_reason(tmp_path: Path) -> None:
    command = [*SMALL, "--results-dir", str(tmp_path), "--engine", "flower", "--name", "killed", "--rounds", "100000"]
    with started(tmp_path, *command, STARTED_BY=str(tmp_path)) as process:
        process.wait_for(lambda: bool(read_rows(tmp_path / "killed")))
        actors = [each for each in psutil.process_iter() if each.name().startswith("ray::ClientApp")]
        next(each for each in actors if each.environ().get("STARTED_BY") == str(tmp_path)).kill()
        done = process.wait(100)
    assert done.returncode == 1, done
    assert "error: a Ray actor, which trains clients, has died (<class 'ray.exceptions." in done.stdout


NOBODY = 65534


def health_seen_by(user: int, port: int) -> int:
    """The status that a SuperLink answers a user with, who also pretends to be on its own end of the connection."""
    if not (process := os.fork()):
        with contextlib.suppress(BaseException):
            if user != os.geteuid():
                os.setgroups([])
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
            http = HTTPConnection("127.0.0.1", port, timeout=60)
            http.request("GET", "/health", headers={"X-Forwarded-For": "127.0.0.1"})
            os._exit({200: 1, 403: 2}.get(http.getresponse().status, 3))
        os._exit(4)
    return {1: 200, 2: 403}[os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])]


def test_where_the_system_does_not_tell_whose_a_connection_is_a_line_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "private_superlink" in flwr_run._superlink_command()[-1]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(flwr_run, "SOCKETS", tmp_path / "none")
    assert flwr_run._superlink_command() == [str(Path(sys.executable).with_name("flower-superlink"))]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: engine = flower: while it runs, other users of this machine can run code as you")


@pytest.mark.parametrize("client", [("127.0.0.1", 1), ("127.0.0.1", 0)])
def test_a_request_of_no_known_user_is_refused(client: tuple[str, int]) -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent.append(scope["type"])

    async def send(message: Any) -> None:
        sent.append(message.get("status", message["type"]))

    async def receive() -> Any:
        raise AssertionError

    async def ask(kind: str) -> None:
        await for_own_user(app)({"type": kind, "client": client, "server": ("127.0.0.1", 2)}, receive, send)

    for kind in ("lifespan", "http", "websocket"):
        asyncio.run(ask(kind))
    assert sent == ["lifespan", 403, "http.response.body"]


def test_flwr_run_as_flowers_users_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``flwr run .`` with run-config overrides resumes a run of `lenet5` that was begun in this process, bit for bit.

    The run that it is compared with is by the default engine.

    A run that no process begins fails, not waits. Requests of another user are refused.
    With a strategy of the user's: the server's process finds the module by PYTHONPATH, and the clients do not need it.
    """
    modules = tmp_path / "modules"
    modules.mkdir()
    shutil.copy(ROOT / "tests" / "strategies" / "user_strategies.py", modules / "own_strategies.py")
    monkeypatch.syspath_prepend(modules)
    monkeypatch.setenv("PYTHONPATH", str(modules))
    keys = {**TINY, "outer": "own_strategies:SlowMo", "results-dir": str(tmp_path)}
    here = fedsim.localsgd(**{name.replace("-", "_"): value for name, value in keys.items()}, name="here")
    config = resolve(Config().changed(keys), "localsgd")
    overrides = " ".join(f"{name}={json.dumps(value)}" for name, value in {**keys, "name": "plain"}.items())
    with superlink(tmp_path) as env:
        app = copy_app(tmp_path / "app")
        command = [str(Path(sys.executable).with_name("flwr")), "run", ".", "fedsim", "--stream", "-c", overrides]
        execute(config.changed({"name": "plain", "stop-after-rounds": 1}), "localsgd")
        right = [*command, "--federation-config", federation(config)]
        subprocess.run(right, cwd=app, env=env, capture_output=True, text=True, timeout=200, check=True)
        (port,) = map(int, re.findall(r"127\.0\.0\.1:(\d+)", (tmp_path / "config.toml").read_text()))
        assert health_seen_by(os.geteuid(), port) == 200
        if os.geteuid() == 0:
            assert health_seen_by(NOBODY, port) == 403
        mark = {name: value for name, value in env.items() if name.startswith("FEDSIM_STARTED_")}
        (executor,) = (each for each in marked(mark) if "flower-superexec" in " ".join(each.cmdline()))
        executor.kill()
        monkeypatch.setattr(flwr_run, "SILENCE_SECONDS", 1)
        monkeypatch.chdir(app)
        with pytest.raises(RunFailed, match="flower-superexec, which begins runs, did not begin this one"):
            flwr_run._stream(right, env)
    assert marked(mark) == []  # Ray's processes too
    assert (tmp_path / "plain" / "summary.json").exists()
    assert rows_of(tmp_path / "plain") == rows_of(here.folder)
    assert_same_bits(final_model(tmp_path / "plain"), final_model(here.folder))


@pytest.mark.slow
def test_a_federation_of_another_size_than_clients_is_refused(tmp_path: Path) -> None:
    """By the server app, which does not wait."""
    keys = {**TINY, "results-dir": str(tmp_path), "name": "refused"}
    config = resolve(Config().changed({**keys, "clients": 5}), "localsgd")
    overrides = " ".join(f"{name}={json.dumps(value)}" for name, value in keys.items())
    with superlink(tmp_path) as env:
        command = [str(Path(sys.executable).with_name("flwr")), "run", ".", "fedsim", "--stream", "-c", overrides]
        command += ["--federation-config", federation(config)]
        app = copy_app(tmp_path / "app")
        refused = subprocess.run(command, cwd=app, env=env, capture_output=True, text=True, timeout=200)
    line = (
        "error: clients = 2, but only 0 nodes can take part, and 2 must. Left out: its federation has 5 nodes, not "
        "clients = 2: make them equal, by -c clients=N, or in a simulation by --federation-config num-supernodes=2"
    )
    assert line in refused.stdout
    assert "Traceback" not in refused.stdout
    assert not (tmp_path / "refused").exists()
