"""SIGINT, SIGTERM and SIGHUP at random moments: the exit code, one line, no process left, and a run that resumes."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedsim.bench.turn import take_turn
from fedsim.config import Config
from fedsim.runs.records import read_rows
from fedsim.system.interrupts import SIGNALS, exit_on_signals
from tests.commands import Command, default_signals, executed, forked, here, started
from tests.conftest import assert_same_bits, final_model, rows_of

ROOT = Path(__file__).parents[1]
DATA = "--dataset synthetic:images=256 --model lenet5 --batch-size 16 --device cpu --threads 1"
RUN = f"--clients 2 --rounds 100000 --schedule cosine --checkpoint-every 7 {DATA} --name run"
RUNS = {
    "localsgd": f"localsgd --local-steps 2 {RUN}",
    "stacked": f"localsgd --local-steps 2 --engine stacked {RUN.replace('--clients 2', '--clients 5')}",
    "long rounds": f"localsgd --local-steps 500 {RUN}",
    "centralized": f"centralized --epochs 10000 --checkpoint-every 1 {DATA} --name run",
}
STOP = {name: "--stop-after-epochs" if name == "centralized" else "--stop-after-rounds" for name in RUNS}
GRID = f"grid --clients 1,2 --local-steps 2 --seeds 1,2 --rounds 100 --checkpoint-every 7 {DATA} --name grid"
BENCH = (
    "bench --clients 2 --variants centralized,in-process --no-grow --timed 1 --passes 1 --local-steps 2 --model lenet5 "
    "--batch-size 16 --device cpu -o bench.json"
)
FLOWER = f"localsgd --local-steps 2 --engine flower {RUN}"
LINE = "interrupted: run the same command again to resume from the last checkpoint"
UNSAVED = "interrupted: there is no checkpoint yet: the same command starts again"
SECONDS = 60  # in which an interrupted command must have ended


def interrupt(process: Command, number: signal.Signals, line: str) -> bool:
    """Send the signal twice, as an impatient user would; check how the command ends; whether it still ran."""
    left: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        left = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        time.sleep(0.01)
        process.send_signal(number)
    code, _, errors = process.wait(SECONDS)
    if code in (0, -number):  # it had finished, and the interpreter was about to
        assert "Traceback" not in errors
        return False
    assert code == 128 + number, errors
    said = [each for each in errors.splitlines() if not each.startswith("K = ")]  # the bench says what it measures
    assert said in ([line], ["interrupted"]), errors
    _, left = psutil.wait_procs(left, timeout=10)
    assert not left
    return True


def after_rows(process: Command, rows: int) -> None:
    """Wait until a run has printed so many rows."""
    process.wait_for(lambda: len(re.findall(r"^round .*\n", process.stdout, re.MULTILINE)) >= rows)


def assert_resumes(folder: Path, name: str) -> None:
    """The interrupted run in `folder`, resumed for some rounds, is bit for bit one that was never interrupted."""
    stop = len(read_rows(folder / "results" / "run")) + 2
    for place in (folder, folder / "undisturbed"):
        place.mkdir(exist_ok=True)
        here(place, *f"{RUNS[name]} {STOP[name]} {stop}".split())
    interrupted, undisturbed = (place / "results" / "run" for place in (folder, folder / "undisturbed"))
    assert_same_bits(final_model(interrupted), final_model(undisturbed))
    assert rows_of(interrupted) == rows_of(undisturbed)


def test_an_interrupted_run_says_how_to_resume_and_does_so_bit_for_bit(tmp_path: Path) -> None:
    for rows, number in zip((3, 9, 1), SIGNALS, strict=True):
        with started(tmp_path, *RUNS["localsgd"].split()) as process:
            after_rows(process, rows)
            assert interrupt(process, number, UNSAVED if rows == 3 else LINE)
    assert_resumes(tmp_path, "localsgd")


def test_a_long_round_is_not_waited_for(tmp_path: Path) -> None:
    with started(tmp_path, *RUNS["long rounds"].replace("500", "30000").split()) as process:
        process.wait_for(lambda: "\n" in process.stdout)
        time.sleep(0.5)
        assert interrupt(process, signal.SIGTERM, UNSAVED)


HANG_UP = """
import os, pty, sys

pid, terminal = pty.fork()
if pid == 0:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
shown = b""
while b"/100000" not in shown:
    shown += os.read(terminal, 4096)
os.close(terminal)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_terminal_that_hangs_up_ends_a_grid(tmp_path: Path) -> None:
    """Its progress bar fails to write there, and must not hide why the command ended."""
    command = [sys.executable, "-c", HANG_UP, str(ROOT / "run.py"), *GRID.replace("100", "100000").split()]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=5 * SECONDS, preexec_fn=default_signals
    )
    assert (done.stdout, done.stderr) == (f"{128 + signal.SIGHUP}\n", "")


def test_with_rerun_the_line_says_to_leave_it_out(tmp_path: Path) -> None:
    line = "interrupted: run the same command again without --rerun to resume from the last checkpoint"
    with started(tmp_path, *RUNS["centralized"].split(), "--rerun") as process:
        after_rows(process, 2)  # the first is saved
        assert interrupt(process, signal.SIGINT, line)


def endless_turn() -> None:
    keys = {"dataset": "synthetic:images=256", "model": "lenet5", "batch-size": 16, "device": "cpu"}
    with exit_on_signals():
        take_turn("in-process", Config().changed({**keys, "clients": 2, "threads": 1}), 10**9, 10**9)


def commands_of_children(pid: int) -> list[str]:
    """The words of the commands of a process's children: torch starts some too, while it is imported."""
    words: list[str] = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            words += child.cmdline()
    return words


def test_a_process_of_the_bench_is_ended() -> None:
    with forked(endless_turn) as process:
        process.wait_for(lambda: "fedsim.bench.turn" in commands_of_children(process.pid))
        time.sleep(0.3)
        assert interrupt(process, signal.SIGHUP, "interrupted")


def test_signals_ignored_from_the_start_stay_ignored(tmp_path: Path) -> None:
    """As under nohup."""
    code = "import signal, os; from fedsim.system.interrupts import raise_on_signals; raise_on_signals(); "
    script = f"trap '' HUP; {sys.executable} -c '{code} os.kill(os.getpid(), signal.SIGHUP); print(1)'"
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True, cwd=ROOT).stdout == "1\n"


def test_a_signal_ends_a_process_with_its_code_where_standard_output_is_closed() -> None:
    code = "import os; from fedsim.system.interrupts import exit_on_signals\n"
    code += "with exit_on_signals(): os.kill(os.getpid(), 15)"
    script = f'exec {sys.executable} -c "$0" >&-'
    done = subprocess.run(["sh", "-c", script, code], stderr=subprocess.PIPE, text=True, preexec_fn=default_signals)
    assert (done.returncode, done.stderr) == (143, "interrupted\n")


def test_a_run_whose_output_nobody_reads_any_more_ends_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by ``| head -1``."""
    read, write = os.pipe()
    os.close(read)
    with open(os.devnull, "w") as nothing, os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as ended:
            here(tmp_path, *RUNS["localsgd"].split())
        os.dup2(nothing.fileno(), write)  # for what is left to be flushed
    assert ended.value.code == 1
    line = "error: standard output was closed by whoever read it: there is no checkpoint yet: the same command starts"
    assert capsys.readouterr().err == f"{line} again\n"


SWALLOWED = """
import gc, os, signal, sys, time, weakref
from fedsim.system.interrupts import exit_on_signals

class Held:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)  # here Python raises the exception, and may only report it

with exit_on_signals():
    Held()
    time.sleep(30)
    print("not reached")
"""
ORPHAN = """
import os, signal, subprocess, time
from fedsim.system.interrupts import exit_on_signals

with exit_on_signals():
    subprocess.run(["sh", "-c", "setsid sleep 600 >/dev/null 2>&1 & echo $!"])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
"""
HELD = """
import os, signal
from fedsim.system import torch_import
from fedsim.system.interrupts import exit_on_signals

def import_slowly(name):
    os.kill(os.getpid(), signal.SIGTERM)
    print("imported", flush=True)

torch_import.import_module = import_slowly
with exit_on_signals():
    torch_import.import_torch()
    print("never reached", flush=True)
"""
CLEANUP = """
import os, signal, time
from fedsim.system.interrupts import exit_on_signals

with exit_on_signals():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        time.sleep(0.1)
        print("cleaned up", flush=True)
"""


def python(code: str, stderr: int | None = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter that handles signals as a shell's command does."""
    return subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        cwd=ROOT,
        timeout=5 * SECONDS,
        preexec_fn=default_signals,
    )


def test_a_signal_within_a_destructor_is_not_lost() -> None:
    done = python(SWALLOWED)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "interrupted\n")


def test_a_signal_is_held_while_torch_is_imported_and_handled_after_it() -> None:
    done = python(HELD)
    assert (done.returncode, done.stdout, done.stderr) == (143, "imported\n", "interrupted\n")


def test_a_process_that_outlives_its_parent_is_ended() -> None:
    done = python(ORPHAN, stderr=None)
    assert done.returncode == 143
    assert not psutil.pid_exists(int(done.stdout)) or psutil.Process(int(done.stdout)).status() == "zombie"


def test_signals_during_the_cleanup_do_not_skip_it() -> None:
    done = python(CLEANUP)
    assert (done.returncode, done.stdout, done.stderr) == (130, "cleaned up\n", "interrupted\n")


MOMENTS = 20


def disturb(folder: Path, arguments: str, line: str, most: float, moments: random.Random) -> int:
    """Start the command again and again, each time with a signal after up to `most` seconds; how many still ran."""
    hit = 0
    for _ in range(MOMENTS):
        with executed(folder, *arguments.split()) as process:  # whose imports are interrupted too
            process.wait_for_signal_handlers()
            time.sleep(moments.uniform(0, most))
            hit += interrupt(process, moments.choice(SIGNALS), line)
    return hit


def seconds_of(folder: Path, arguments: str) -> float:
    """The seconds that the command takes in a process of its own, undisturbed."""
    began = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "run.py"), *arguments.split()], cwd=folder, check=True)
    return time.perf_counter() - began


@pytest.mark.chaos
@pytest.mark.parametrize("name", RUNS)
def test_runs_interrupted_at_twenty_random_moments_resume_bit_for_bit(tmp_path: Path, name: str) -> None:
    seconds = seconds_of(tmp_path, f"{RUNS[name]} {STOP[name]} 3 --results-dir warm")
    assert disturb(tmp_path, RUNS[name], LINE, 1.5 * seconds, random.Random(name)) == MOMENTS
    assert_resumes(tmp_path, name)


@pytest.mark.chaos
def test_a_grid_interrupted_at_twenty_random_moments_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    seconds = seconds_of(tmp_path, f"{GRID} --results-dir undisturbed")
    assert disturb(tmp_path, GRID, LINE, seconds, random.Random("grid"))
    here(tmp_path, *GRID.split())
    cells = sorted(path.parent.name for path in (tmp_path / "undisturbed").rglob("model.pt"))
    assert len(cells) == 4
    for cell in cells:
        interrupted, undisturbed = (tmp_path / place / "grid" / cell for place in ("results", "undisturbed"))
        assert_same_bits(final_model(interrupted), final_model(undisturbed))
        assert rows_of(interrupted) == rows_of(undisturbed)


@pytest.mark.chaos
def test_a_report_interrupted_at_twenty_random_moments_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    here(tmp_path, *GRID.replace("--rounds 100", "--rounds 3").split())
    seconds = seconds_of(tmp_path, "report results -o undisturbed")
    assert disturb(tmp_path, "report results -o report", "interrupted", seconds, random.Random("report"))
    here(tmp_path, *"report results -o report".split())
    tables = sorted((tmp_path / "report").glob("*.csv"))
    assert tables
    for table in tables:
        assert table.read_bytes() == (tmp_path / "undisturbed" / table.name).read_bytes()


@pytest.mark.chaos
def test_a_bench_interrupted_at_twenty_random_moments_leaves_no_process(tmp_path: Path) -> None:
    seconds = seconds_of(tmp_path, BENCH)
    assert disturb(tmp_path, BENCH, "interrupted", seconds, random.Random("bench"))


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_a_run_by_flower_interrupted_at_twenty_random_moments_leaves_no_process(tmp_path: Path) -> None:
    assert disturb(tmp_path, FLOWER, LINE, 30, random.Random("flower")) == MOMENTS
