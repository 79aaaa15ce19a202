"""fedsim's command line for tests: in this process, in a forked process, or by ``python run.py``.

A new interpreter takes seconds to import torch. A forked process has imported it and starts within 0.1 s; it has its
own session, working directory, environment and output, and it handles signals as ``python run.py`` does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any, NamedTuple

import pytest

from fedsim import cli
from fedsim.system.interrupts import SIGNALS

ROOT = Path(__file__).parents[1]
SECONDS = 300.0  # in which a command must have ended
IMPORTED = ["fedsim.cli", "fedsim.experiments.execute", "fedsim.experiments.tune", "fedsim.report.page"]


Process = BaseProcess | subprocess.Popen[bytes]


class Done(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def here(folder: Path, *arguments: str) -> None:
    """Run a command in this process, with `folder` as working directory; raises SystemExit where it fails."""
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setattr(sys, "argv", ["run.py", *arguments])
        cli.main()


class Command:
    """A command in a process and session of its own."""

    def __init__(self, process: Process, stdout: IO[bytes], stderr: IO[bytes]) -> None:
        self.process, self._stdout, self._stderr = process, stdout, stderr
        assert process.pid is not None
        self.pid: int = process.pid

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return _content(self._stdout)

    @property
    def stderr(self) -> str:
        """What it has printed to standard error so far."""
        return _content(self._stderr)

    @property
    def returncode(self) -> int | None:
        """Its exit code, or the negative number of the signal that ended it; None while it runs."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Raises ProcessLookupError if it has ended."""
        os.kill(self.pid, number)

    def wait_for(self, condition: Callable[[], bool], seconds: float = SECONDS) -> None:
        """Wait until `condition` is true; the command must not end before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.returncode is None, f"the command ended early:\n{self.stdout}{self.stderr}"
            assert time.monotonic() < deadline, f"it did not happen within {seconds} s"
            time.sleep(0.01)

    def wait_for_signal_handlers(self) -> None:
        """Wait until it handles signals, or has ended."""
        deadline = time.monotonic() + SECONDS
        while self.returncode is None:
            assert time.monotonic() < deadline, f"it handles no signals within {SECONDS} s"
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{self.pid}/status").read_text()
                caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
                if all(caught >> (number - 1) & 1 for number in SIGNALS):
                    break
            time.sleep(0.001)

    def wait(self, seconds: float = SECONDS) -> Done:
        """Wait until it has ended."""
        deadline = time.monotonic() + seconds
        while self.returncode is None:
            assert time.monotonic() < deadline, f"not done within {seconds} s:\n{self.stdout}{self.stderr}"
            time.sleep(0.01)
        return Done(self.returncode, self.stdout, self.stderr)

    def end(self) -> None:
        """End it: first by SIGTERM, upon which it ends what it has started."""
        for end in (self.process.terminate, self.process.kill):
            deadline = time.monotonic() + 60
            while self.returncode is None and time.monotonic() < deadline:
                end()
                time.sleep(0.1)


def _content(file: IO[bytes]) -> str:
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


@contextlib.contextmanager
def _ended(command: Command) -> Iterator[Command]:
    try:
        yield command
    finally:
        command.end()


@contextlib.contextmanager
def executed(folder: Path, *arguments: str, program: Path = ROOT / "run.py", **env: str) -> Iterator[Command]:
    """Context manager: as `started`, by a new interpreter that runs the file `program`."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [sys.executable, str(program), *arguments],
            cwd=folder,
            env={**os.environ, **env},
            preexec_fn=default_signals,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        with _ended(Command(process, stdout, stderr)) as command:
            yield command


@contextlib.contextmanager
def started(folder: Path, *arguments: str, **env: str) -> Iterator[Command]:
    """Context manager: a command with `folder` as working directory and `env` added to the environment."""
    with forked(_command, list(arguments), folder=folder, **env) as command:
        yield command


def run(folder: Path, *arguments: str, **env: str) -> Done:
    """Run a command as in `started`."""
    with started(folder, *arguments, **env) as command:
        return command.wait()


@contextlib.contextmanager
def forked(target: Callable[..., object], *arguments: Any, folder: Path = ROOT, **env: str) -> Iterator[Command]:
    """Context manager: the function `target` in a process of its own; it is ended with the block."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        streams = DupFd(stdout.fileno()), DupFd(stderr.fileno())
        process = forkserver().Process(
            target=_in_new_process, args=(folder, {**os.environ, **env}, streams, target, arguments), daemon=True
        )
        process.start()
        with _ended(Command(process, stdout, stderr)) as command:
            yield command


def forkserver() -> ForkServerContext:
    """Where processes are forked from one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def default_signals() -> None:
    """Handle signals as a shell's command does, also where the tests run with these ignored, as under nohup."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _in_new_process(
    folder: Path,
    env: dict[str, str],
    streams: tuple[Any, Any],
    target: Callable[..., object],
    arguments: tuple[Any, ...],
) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # that of `env`
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    for number, stream in enumerate(streams, 1):
        os.dup2(stream.detach(), number)
    sys.stdin, sys.stdout, sys.stderr = open(os.devnull), open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    default_signals()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    target(*arguments)


def _command(arguments: list[str]) -> None:
    sys.argv = ["run.py", *arguments]
    runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
