"""The processes of a command are found by their mark, also in the moment in which they start."""

import subprocess
import threading

import psutil
import pytest

from fedsim.system import processes
from fedsim.system.processes import end_marked, marked, new_mark


def test_a_process_without_an_environment_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux shows an empty environment during execve; a process that was started with none looks the same."""
    monkeypatch.setattr(processes, "SCANS", 6000)  # a minute
    mark = new_mark()
    words = " ".join(f"{key}={value}" for key, value in mark.items())
    script = f"read line; export {words}; exec sleep 600"
    process = subprocess.Popen(["/bin/sh", "-c", script], env={}, stdin=subprocess.PIPE)
    assert process.stdin is not None
    timer = threading.Timer(0.5, process.communicate, [b"go\n"])
    timer.start()
    try:
        assert [found.pid for found in marked(mark)] == [process.pid]
        end_marked(mark)
        assert not psutil.pid_exists(process.pid) or psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
    finally:
        process.kill()
        timer.join()


def test_a_process_that_is_started_during_the_search_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SCAN_SECONDS", 0.5)
    mark = new_mark()
    started: list[subprocess.Popen[bytes]] = []
    timer = threading.Timer(0.25, lambda: started.append(subprocess.Popen(["sleep", "600"], env=mark)))
    timer.start()
    try:
        found = marked(mark)
        timer.join()
        assert [process.pid for process in found] == [started[0].pid]
    finally:
        end_marked(mark)
        started[0].wait()
