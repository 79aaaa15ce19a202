"""``flwr run`` for the user: the app on Flower's simulation engine (Ray), with nothing left behind.

Flower would start a SuperLink of the user's that outlives the command, install the app's dependencies anew,
and exit with 0 where the run failed. Here the run has a FLWR_HOME, a SuperLink, a port and a copy of the app
of its own, and its true outcome is told.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path

import psutil
import torch

from fedsim import interrupts
from fedsim.config import Config, cpu_count
from fedsim.errors import RunFailed, UserError
from fedsim.records import origin

CHECKOUT = Path(__file__).resolve().parents[2]
APP = ("pyproject.toml", "README.md", "LICENSE", "fedsim", "strategies")
CONNECTION = "fedsim"
START_SECONDS = 60
OUTCOME_SECONDS = 20


def run_with_flwr(config: Config) -> None:
    """Run `config` (resolved) by ``flwr run`` on Ray; fails where the run did not complete."""
    if not (CHECKOUT / "pyproject.toml").exists():
        raise UserError(f"engine = flower needs fedsim's checkout, which {CHECKOUT} is not: use pip install -e there")
    # The nodes of an existing Ray cluster load the client from it: it lies beside the results, which they share
    shared = config.results_dir if os.environ.get("RAY_ADDRESS") else None
    with tempfile.TemporaryDirectory(prefix=".fedsim-", dir=shared) as folder, superlink(Path(folder)) as env:
        app = copy_app(Path(folder) / "app")
        keys = Path(folder) / "run-config.toml"
        keys.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in config.as_keys().items()))
        command = [_tool("flwr"), "run", str(app), CONNECTION, "--stream", "--run-config", str(keys)]
        run_id = _stream([*command, "--federation-config", federation(config)], env)
        status = _status(run_id, env) if run_id else "not started"
        if status != "finished:completed":
            raise RunFailed(f"flwr run did not complete (its status: {status}); the reason stands in the log above")


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
    """What the app consists of, in a folder whose name Flower accepts and where no other checkout's code lies."""
    app.mkdir()
    for name in APP:
        source = CHECKOUT / name
        if source.is_dir():
            shutil.copytree(source, app / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, app / name)
    return app


@contextlib.contextmanager
def superlink(folder: Path) -> Iterator[dict[str, str]]:
    """A SuperLink for simulations in `folder`, ended afterwards; yields the environment to reach it by."""
    port = free_port()
    (folder / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n'
        f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    env = environment(folder)
    command = [_tool("flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    log = folder / "superlink.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=env, cwd=folder, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_until_healthy(process, port, log)
        yield env
    finally:
        end(process)


def environment(home: Path) -> dict[str, str]:
    """The environment of Flower's commands with `home` as their FLWR_HOME: nothing installed, nothing reported."""
    # A proxy of the user's is not for the way to this machine's own server
    direct = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1"]))
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "NO_PROXY": direct,
        "no_proxy": direct,
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_ADDRESS": os.environ.get("RAY_ADDRESS") or "local",  # else Ray joins any cluster that runs here
        "RAY_USAGE_STATS_ENABLED": "0",
        "FEDSIM_ORIGIN": json.dumps(origin()),
    }


def wait_until_healthy(
    process: subprocess.Popen[bytes], port: int, log: Path, trust: ssl.SSLContext | None = None
) -> None:
    """Wait until the SuperLink answers, by TLS if `trust` is given; fail with the end of its log if it does not."""
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


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        interrupts.end([psutil.Process(process.pid)])
    process.wait()


def _stream(command: list[str], env: dict[str, str]) -> str:
    """Run ``flwr run --stream``, its log passed on; returns the run's id, or nothing if it did not start."""
    run_id = ""
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                if found := re.search(r"Successfully started run (\d+)", line):
                    run_id = found[1]
        except BaseException:  # it would follow the log until its SuperLink, which waits for it, ends
            process.terminate()
            raise
    return run_id


def _status(run_id: str, env: dict[str, str]) -> str:
    """Flower's word for how the run ended; a moment passes between the last line of its log and its end."""
    command = [_tool("flwr"), "list", CONNECTION, "--run-id", run_id, "--format", "json"]
    deadline = time.monotonic() + OUTCOME_SECONDS
    while True:
        answer = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60).stdout
        try:
            runs = json.loads(answer).get("runs", [])
        except json.JSONDecodeError:  # the SuperLink is gone
            runs = []
        status = runs[0]["status"] if runs else "unknown"
        if status.startswith("finished") or time.monotonic() > deadline:
            return str(status)


def _tool(name: str) -> str:
    """The command `name` of the environment that this Python belongs to."""
    return str(Path(sys.executable).with_name(name))


def free_port() -> int:
    """A port of the loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
