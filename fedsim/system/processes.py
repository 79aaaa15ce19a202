"""End all processes that a command has started: they are found by a mark in their environment."""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

STOP_SECONDS = 5  # from SIGTERM to SIGKILL
SCANS = 20  # passes over all processes at most: one that is just starting is found in a later pass
SCAN_SECONDS = 0.01  # between two passes
KILLS = 6  # how often to kill what is left; a process that waits for a dead disk cannot be killed


def new_mark() -> dict[str, str]:
    """Environment variables that no other process has. Child processes inherit them.

    So a process is found even if it starts a new session or outlives its parent.
    """
    # Ray's processes change their titles, which overwrites their environment without SPT_NOENV
    return {f"FEDSIM_STARTED_{secrets.token_hex(8)}": "1", "SPT_NOENV": "1"}


def marked(mark: Mapping[str, str]) -> list[psutil.Process]:
    """The processes that have `mark` in their environment, also those that are started during the search."""
    found: list[psutil.Process] = []
    decided: set[int] = set()
    for _ in range(SCANS):
        undecided = set(psutil.pids()) - decided
        if not undecided:
            break
        for pid in undecided:
            with contextlib.suppress(psutil.Error, OSError):
                process = psutil.Process(pid)
                environment = process.environ()
                if not environment and process.exe():  # unlike a thread of the kernel
                    continue  # during execve, the environment is empty
                if mark.items() <= environment.items():
                    found.append(process)
            decided.add(pid)
        time.sleep(SCAN_SECONDS)
    return found


def end_marked(mark: Mapping[str, str]) -> None:
    """Terminate every process with `mark`; after `STOP_SECONDS`, kill those that are left, and report the rest."""
    for stop in (psutil.Process.terminate, *KILLS * [psutil.Process.kill]):
        processes = marked(mark)
        if not processes:
            return
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                stop(process)
        psutil.wait_procs(processes, timeout=STOP_SECONDS)
    for process in marked(mark):
        with contextlib.suppress(OSError):  # the terminal may be closed
            print(f"process {process.pid} could not be ended", file=sys.stderr, flush=True)


@contextlib.contextmanager
def cleanup(clean: Callable[[], object]) -> Iterator[None]:
    """Context manager: call `clean` at its end, again if a signal raises an exception during the first call."""
    try:
        try:
            yield
        finally:
            clean()
    finally:  # a signal may have interrupted the call above
        clean()


@contextlib.contextmanager
def running(
    command: Sequence[str], env: Mapping[str, str], output: IO[bytes], cwd: Path | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, str]]]:
    """Context manager: start `command` in a new session with `env` and a mark; yields the process and the mark.

    At its end, every process with that mark is ended.
    """
    mark = new_mark()
    started: list[subprocess.Popen[bytes]] = []

    def end() -> None:
        end_marked(mark)
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it could not be ended, as was reported
                process.wait(STOP_SECONDS)

    with cleanup(end):
        process = subprocess.Popen(
            command,
            env={**env, **mark},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        started.append(process)
        yield process, mark
