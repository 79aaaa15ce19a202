"""A federation started from the files that ``deploy`` wrote, by its own scripts: real processes on loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedsim.deploy.files import Federation, deploy
from fedsim.federation.flwr_run import wait_until_healthy
from fedsim.system.processes import end_marked, new_mark

BIN = str(Path(sys.executable).parent)
JOINED = "SuperNode ID"  # a node's log says it when the SuperLink has accepted it
JOIN_SECONDS = 60
REJOIN_SECONDS = 120


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its descendants."""
    tree: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        leader = psutil.Process(process.pid)
        tree = [leader, *leader.children(recursive=True)]
    for one in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.terminate()
    for one in psutil.wait_procs(tree, timeout=5)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


class Started:
    """A script of the federation and the process it has become."""

    def __init__(self, script: Path, log: Path) -> None:
        self.script = script
        self.log = log
        self.mark = new_mark()
        self.start()

    def start(self) -> None:
        """Start it, or start it again by the same command; its log is continued."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                ["bash", str(self.script)],
                env={**os.environ, "FEDSIM_BIN": BIN, **self.mark},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def join(self, seconds: float = REJOIN_SECONDS) -> None:
        """Start a node that was ended again and again, as systemd would, until it has joined.

        After a kill -9 the SuperLink takes it for connected, and refuses it, for a minute.
        """
        joined = self.says().count(JOINED)
        deadline = time.monotonic() + seconds
        while self.says().count(JOINED) == joined:
            assert time.monotonic() < deadline, f"not back within {seconds} s:\n{self.says()[-2000:]}"
            if self.process.poll() is not None:
                self.start()
            time.sleep(1)

    def kill(self) -> None:
        """End it without a chance to do anything about it (kill -9); what it has started is left to itself."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """End it and all that it started, before it was killed too."""
        end_marked(self.mark)
        self.process.wait()

    def says(self) -> str:
        """Its log so far."""
        return self.log.read_text(errors="replace")

    def wait_for(self, words: str, seconds: float = JOIN_SECONDS, times: int = 1) -> None:
        """Wait until its log holds `words`, so many times."""
        deadline = time.monotonic() + seconds
        while self.says().count(words) < times:
            assert time.monotonic() < deadline, f"no {words!r} within {seconds} s:\n{self.says()[-2000:]}"
            time.sleep(0.1)


@contextlib.contextmanager
def started(script: Path, log: Path) -> Iterator[Started]:
    """A script of the federation as a process, ended afterwards."""
    one = Started(script, log)
    try:
        yield one
    finally:
        one.end()


@dataclass
class Running:
    """The processes of a federation, its folder, and the environment of its client."""

    folder: Path
    port: int
    link: Started
    nodes: list[Started]
    env: dict[str, str]

    def flwr(self, *arguments: str, seconds: float = 400) -> subprocess.CompletedProcess[str]:
        """Flower's command line as the federation's client; standard error stands in stdout."""
        command = [f"{BIN}/flwr", *arguments]
        return subprocess.run(
            command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds
        )

    def wait_until_healthy(self) -> None:
        """Wait until the SuperLink answers; after a restart too."""
        certificate = self.folder / "client" / "ca.crt"
        trust = ssl.create_default_context(cafile=certificate) if certificate.exists() else None
        wait_until_healthy(self.link.process, self.port, self.link.log, trust)


@contextlib.contextmanager
def running(folder: Path, nodes: int = 4, insecure: bool = False) -> Iterator[Running]:
    """Deploy a federation into the new `folder` and start it: the SuperLink, the registration, the nodes."""
    port = free_ports(1 + nodes)
    deploy(Federation(nodes, port=port, insecure=insecure), folder)
    link = Started(folder / "superlink" / "superlink.sh", folder / "superlink.log")
    here = Running(folder, port, link, [], client_environment(folder / "client"))
    try:
        here.wait_until_healthy()
        if not insecure:
            subprocess.run(["bash", str(folder / "client" / "register.sh")], env=here.env, check=True, timeout=120)
        for node in range(nodes):
            here.nodes.append(Started(folder / f"nodes/{node}/node.sh", folder / f"node-{node}.log"))
        for one in here.nodes:
            one.wait_for(JOINED)
        yield here
    finally:
        with ThreadPoolExecutor() as pool:  # each takes seconds to end
            list(pool.map(Started.end, [*here.nodes, link]))


def client_environment(client: Path) -> dict[str, str]:
    """The environment that the client's env.sh sets."""
    command = ["bash", "-c", '(. "$0"/env.sh; env -0)', str(client)]
    done = subprocess.run(command, env={**os.environ, "FEDSIM_BIN": BIN}, stdout=subprocess.PIPE, text=True, check=True)
    return dict(line.split("=", 1) for line in done.stdout.split("\0") if line)


def free_ports(count: int) -> int:
    """The first of `count` ports in a row of the loopback that nothing listens on now."""
    for _ in range(100):
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError, OverflowError):
            first: int = _bound(probes, 0)
            for more in range(1, count):
                _bound(probes, first + more)
            return first
    raise AssertionError(f"no {count} free ports in a row")


def _bound(probes: contextlib.ExitStack, port: int) -> int:
    probe = probes.enter_context(socket.socket())
    probe.bind(("127.0.0.1", port))
    bound: int = probe.getsockname()[1]
    return bound
