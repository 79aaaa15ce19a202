"""``flwr run`` for the user: the app on Flower's simulation engine (Ray), with nothing left behind.

By itself ``flwr run`` starts a SuperLink that outlives it, installs the app's dependencies again, and exits with 0
where the run failed. Here the run has its own FLWR_HOME, SuperLink, port, copy of the app and, unless it joins a
cluster, Ray; its outcome is reported, and all of them are gone when it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from tempfile import gettempdir

import tomli_w
import torch

from fedsim import __version__
from fedsim.config import Config
from fedsim.device import cpu_count
from fedsim.errors import RunFailed, UserError
from fedsim.system.private_ray import private_ray
from fedsim.system.processes import cleanup, running
from fedsim.system.provenance import origin

CHECKOUT = Path(__file__).resolve().parents[2]  # or where the two packages are installed
PACKAGES = ("fedsim", "strategies")
APP = {  # what Flower reads of pyproject.toml, which an installed fedsim has not
    "project": {"name": "fedsim", "version": __version__, "description": "LocalSGD", "license": "Apache-2.0"},
    "tool": {
        "flwr": {
            "app": {
                "publisher": "fedsim",
                "components": {
                    "serverapp": "fedsim.federation.server_app:app",
                    "clientapp": "fedsim.federation.client_app:app",
                },
                "config": Config().as_keys(),
            }
        }
    },
}
CONNECTION = "fedsim"
TOOLS = ("flwr", "flower-superlink")
START_SECONDS = 60
OUTCOME_SECONDS = 20
ANSWER_SECONDS = 180  # of a SuperLink, also on a machine with much else to do
SOCKETS = Path("/proc/net/tcp")  # where Linux lists connections with their users
SUBMIT_SECONDS = 300
SILENCE_SECONDS = 60  # of a run's log, after which the run is looked for; then twice as long each time
MOST_SILENCE_SECONDS = 600
RAY_PATH = 36  # characters of a folder below which the paths of Ray's sockets keep within the system's limit of 107


def run_with_flwr(config: Config) -> None:
    """Run `config` (resolved) by ``flwr run`` on Ray; raises RunFailed where the run did not complete."""
    # The nodes of an existing Ray cluster load the client from it: it lies beside the results, which they share
    shared = None if os.environ.get("RAY_ADDRESS", "local") in ("", "local") else config.results_dir
    # Ray keeps its files in this folder, and knows ASCII alone
    folder = tempfile.TemporaryDirectory(prefix=".fs-", dir=shared or (None if gettempdir().isascii() else "/tmp"))
    with cleanup(folder.cleanup), superlink(Path(folder.name)) as env:
        app = copy_app(Path(folder.name) / "app")
        keys = Path(folder.name) / "run-config.toml"
        keys.write_text(tomli_w.dumps(config.as_keys()), encoding="utf-8")
        command = [_tool("flwr"), "run", str(app), CONNECTION, "--stream", "--run-config", str(keys)]
        run_id = _stream([*command, "--federation-config", federation(config)], env)
        status = _status(run_id, env) if run_id else "not started"
        if status != "finished:completed":
            raise RunFailed(f"flwr run did not complete (its status: {status}); the log above gives the reason")


def federation(config: Config) -> str:
    """Flower's federation config: K nodes that share this machine's cores and GPUs."""
    gpus = 0.0
    if config.device.startswith("cuda"):
        gpus = min(1.0, torch.cuda.device_count() / config.clients)
    return (
        f"num-supernodes={config.clients} client-resources-num-cpus={min(config.threads, cpu_count())} "
        f"client-resources-num-gpus={gpus}"
    )


def copy_app(app: Path) -> Path:
    """Copy the app to the new folder `app`, whose name Flower accepts and which holds no other code."""
    app.mkdir()
    (app / "pyproject.toml").write_text(tomli_w.dumps(APP), encoding="utf-8")
    for name in PACKAGES:
        shutil.copytree(CHECKOUT / name, app / name, ignore=shutil.ignore_patterns("__pycache__"))
    return app


@contextlib.contextmanager
def superlink(folder: Path) -> Iterator[dict[str, str]]:
    """A SuperLink for simulations in `folder`; yields the environment for Flower's commands to reach it.

    After the block it is ended, and so is every process that was started in that environment.
    """
    port = free_port()
    (folder / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n'
        f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    command = [*_superlink_command(), "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    log = folder / "superlink.log"
    env = environment(folder)
    with log.open("wb") as output, running(command, env, output, folder) as (process, mark):
        wait_until_healthy(process, port, log)
        yield {**env, **mark}


def _superlink_command() -> list[str]:
    """The command of a SuperLink that serves this user alone, where the kernel lists the users of connections."""
    if SOCKETS.exists():
        return [sys.executable, "-P", str(Path(__file__).with_name("private_superlink.py"))]
    print(
        "warning: engine = flower: while it runs, other users of this machine can run code as you, by the SuperLink on "
        "its loopback interface",
        file=sys.stderr,
    )
    return [_tool("flower-superlink")]


def environment(home: Path, ray_address: str = "") -> dict[str, str]:
    """The environment of Flower's commands with `home` as their FLWR_HOME: nothing installed, nothing reported.

    `ray_address` is the Ray cluster to join, by default the user's RAY_ADDRESS. Without either, or with "local", Ray
    starts a cluster, whichever others run on this machine, and keeps its files in `home`, unless the paths of its
    sockets would be too long there.
    """
    # Connections to the SuperLink on this machine bypass any proxy
    direct = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1"]))
    modules = os.environ.get("PYTHONPATH")  # Flower's processes work in another folder
    env = {
        **os.environ,
        **({"PYTHONPATH": os.pathsep.join(map(os.path.abspath, modules.split(os.pathsep)))} if modules else {}),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "NO_PROXY": direct,
        "no_proxy": direct,
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_ADDRESS": ray_address or os.environ.get("RAY_ADDRESS") or "local",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FEDSIM_ORIGIN": json.dumps(origin()),
    }
    if env["RAY_ADDRESS"] == "local":
        env |= private_ray()
        if len(str(home)) <= RAY_PATH:
            env["RAY_TMPDIR"] = str(home)
    return env


def wait_until_healthy(
    process: subprocess.Popen[bytes], port: int, log: Path, trust: ssl.SSLContext | None = None
) -> None:
    """Wait until the SuperLink answers, by TLS if `trust` is given; raises RunFailed, with the end of its log."""
    deadline = time.monotonic() + START_SECONDS
    here = "127.0.0.1"
    while time.monotonic() < deadline and process.poll() is None:
        http = HTTPSConnection(here, port, timeout=1, context=trust) if trust else HTTPConnection(here, port, timeout=1)
        with contextlib.suppress(OSError), contextlib.closing(http):
            http.request("GET", "/health")
            if http.getresponse().status == 200:
                return
        time.sleep(0.1)
    raise RunFailed(f"the SuperLink did not start:\n{log.read_text(errors='replace')[-2000:]}")


def _stream(command: list[str], env: dict[str, str]) -> str:
    """Run ``flwr run --stream`` and print its log; returns the run's id, or nothing if it did not start.

    Raises RunFailed where the log ends or is silent, and no process works on the run.
    """
    run_id, patience = "", SILENCE_SECONDS
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            lines = _lines_of(process)
            while (line := _next(lines, patience if run_id else SUBMIT_SECONDS)) != "":
                if line is None:
                    if not run_id:
                        raise RunFailed(f"flwr run has not submitted the run within {SUBMIT_SECONDS} s")
                    if _has_ended(run_id, env, patience):
                        process.kill()  # its log has not ended with it
                        break
                    patience = min(2 * patience, MOST_SILENCE_SECONDS)
                    continue
                print(line, end="", flush=True)
                if found := re.search(r"Successfully started run (\d+)", line):
                    run_id = found[1]
        except BaseException:  # it would follow the log until the SuperLink ends
            process.kill()
            raise
    return run_id


def _lines_of(process: subprocess.Popen[str]) -> queue.SimpleQueue[str]:
    """The lines that `process` prints, as they come; an empty one when it has ended."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError):  # closed, as the process is not waited for any longer
            for line in process.stdout:
                lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    return lines


def _next(lines: queue.SimpleQueue[str], seconds: float) -> str | None:
    """The next line; None if there is none within so many seconds."""
    try:
        return lines.get(timeout=seconds)
    except queue.Empty:
        return None


def _has_ended(run_id: str, env: dict[str, str], seconds: float) -> bool:
    """Whether a run whose log was silent for so long has ended; raises RunFailed where no process works on it.

    The SuperLink itself fails a run whose process has died, after a minute without a sign of life.
    """
    status = _status_now(run_id, env)
    if status in ("starting", "running"):
        return False
    if status.startswith("finished"):
        return True
    cause = "the SuperLink does not answer"
    if status == "pending":
        cause = "flower-superexec, which begins runs, did not begin this one: it has ended, or hangs"
    raise RunFailed(f"{cause}; the log above was silent for {seconds:g} s")


def _status(run_id: str, env: dict[str, str]) -> str:
    """Flower's status of a run that has ended; it is reported a moment after the last line of the log."""
    deadline = time.monotonic() + OUTCOME_SECONDS
    while True:
        status = _status_now(run_id, env)
        if status.startswith("finished") or time.monotonic() > deadline:
            return status


def _status_now(run_id: str, env: dict[str, str]) -> str:
    """Flower's status of a run; unknown if the SuperLink does not answer."""
    command = [_tool("flwr"), "list", CONNECTION, "--run-id", run_id, "--format", "json"]
    try:
        answer = subprocess.run(command, env=env, capture_output=True, text=True, timeout=ANSWER_SECONDS).stdout
        runs = json.loads(answer).get("runs", [])
    except (subprocess.TimeoutExpired, json.JSONDecodeError):  # the SuperLink hangs, or is gone
        return "unknown"
    return str(runs[0]["status"]) if runs else "unknown"


def check_tools() -> None:
    """Raise UserError where Flower's commands are not there."""
    for name in TOOLS:
        _tool(name)


def _tool(name: str) -> str:
    """The command `name`, beside this Python or else where the shell finds it."""
    beside = str(Path(sys.executable).parent)
    if found := shutil.which(name, path=beside) or shutil.which(name):
        return found
    raise UserError(
        f"engine = flower needs the command {name}, which is neither in {beside} nor on PATH: install flwr[simulation] "
        "again, or give --engine threads"
    )


def free_port() -> int:
    """A port of the loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
