"""What is left when a run is killed, or its disk is full or read-only: all that was saved, and the way on."""

from __future__ import annotations

import itertools
import json
import multiprocessing.connection
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsim.config import Config
from fedsim.device import resolve
from fedsim.errors import RunFailed, UserError
from fedsim.experiments.execute import execute
from fedsim.runs.records import read_rows, read_summary
from fedsim.runs.run import Run
from tests.commands import forkserver
from tests.conftest import SMALL, assert_same_bits, final_model, rows_of

KILLS = 50


def _run(config: Config, quiet: bool, limit: int) -> None:
    """Run `config` in this process, in which no file may become larger than `limit` bytes; `quiet`: exit as run.py."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        execute(config, "localsgd")
    except (UserError, RunFailed) as error:
        if not quiet:
            raise
        sys.exit(error.exit_code)


def _started(
    config: Config, quiet: bool = False, limit: int = resource.RLIM_INFINITY
) -> multiprocessing.process.BaseProcess:
    """The run in a process of its own."""
    process = forkserver().Process(target=_run, args=(config, quiet, limit))
    process.start()
    return process


@pytest.mark.chaos
def test_a_run_killed_at_fifty_random_moments_ends_bitwise_where_an_undisturbed_one_does(small: Config) -> None:
    """Each time by SIGKILL, in a new process, which resumes from what the previous one saved."""
    keys = {"dataset.images": 128, "schedule": "cosine", "clients": 2, "rounds": 100_000, "checkpoint-every": 1}
    config = resolve(small.changed({**keys, "name": "killed"}), "localsgd")
    for name in ("first", "second"):  # how long ten rounds take here, once all is imported
        began = time.perf_counter()
        _started(config.changed({"name": name, "stop-after-rounds": 10})).join()
        ten_rounds = time.perf_counter() - began

    folder = Path(config.results_dir) / "killed"
    moments = random.Random(2026)
    survived = [0]
    for _ in range(KILLS):
        process = _started(config)
        process.join(moments.uniform(0, 1.5 * ten_rounds))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        survived.append(len(read_rows(folder)) if folder.exists() else 0)
    # Nothing saved was ever lost: at most the last row had no checkpoint yet, and its round was taken again
    assert all(after >= before - 1 for before, after in itertools.pairwise(survived))
    assert len(set(survived)) > KILLS // 4  # and many kills came in the middle of the work

    until = {"stop-after-rounds": survived[-1] + 3}
    killed = execute(config.changed(until), "localsgd")
    undisturbed = execute(config.changed({**until, "name": "undisturbed"}), "localsgd")
    assert_same_bits(final_model(killed), final_model(undisturbed))
    assert rows_of(killed) == rows_of(undisturbed)


def test_of_two_processes_that_start_a_run_at_once_one_runs_it(small: Config) -> None:
    config = resolve(small.changed({"rounds": 100_000, "name": "one"}), "localsgd")
    processes = [_started(config, quiet=True) for _ in range(2)]
    try:
        multiprocessing.connection.wait([process.sentinel for process in processes], timeout=120)
        assert sorted(str(process.exitcode) for process in processes) == [str(UserError.exit_code), "None"]
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The runs `whole` of eight rounds and `part`, stopped after six of them with a checkpoint in each."""
    keys = {**SMALL, "rounds": 8, "results-dir": str(tmp_path_factory.mktemp("stopped"))}
    config = resolve(Config().changed(keys), "localsgd")
    execute(config.changed({"name": "whole"}), "localsgd")
    execute(config.changed({"name": "part", "checkpoint-every": 1, "stop-after-rounds": 6}), "localsgd")
    return config


def copied(stopped: Config, name: str, results: Path) -> Config:
    """The configuration of a copy, in `results`, of one of the two runs."""
    shutil.rmtree(results / name, ignore_errors=True)
    shutil.copytree(Path(stopped.results_dir) / name, results / name)
    return stopped.changed({"results-dir": str(results), "name": name, "checkpoint-every": 1})


def right_or_one_line(config: Config, stopped: Config) -> str:
    """Run `config`: it comes to the model and rows of the whole run, or fails in a line and changes nothing."""
    folder = Path(config.results_dir) / config.name
    before = {path: path.read_bytes() for path in folder.iterdir()}
    try:
        execute(config, "localsgd")
    except (UserError, RunFailed) as error:
        unchanged = {path: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
        assert unchanged == {path: content for path, content in before.items() if path.name != ".lock"}
        return str(error)
    whole = Path(stopped.results_dir) / "whole"
    assert_same_bits(final_model(folder), final_model(whole))
    assert rows_of(folder) == rows_of(whole)
    results = [read_summary(place) or {} for place in (folder, whole)]
    assert results[0]["best_test_accuracy"] == results[1]["best_test_accuracy"]
    return ""


def test_any_flipped_bit_of_a_checkpoint_is_noticed(
    stopped: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(2026)
    good = (Path(stopped.results_dir) / "part" / "checkpoint.pt").read_bytes()
    ends = [*range(100), *range(len(good) - 300, len(good))]  # the headers of the zip file, and the seal
    for place in [*chance.sample(ends, 33), *(chance.randrange(len(good)) for _ in range(33))]:
        run = Run(copied(stopped, "part", tmp_path), "localsgd")
        changed = bytearray(good)
        changed[place] ^= 1 << chance.randrange(8)
        (run.folder / "checkpoint.pt").write_bytes(changed)
        checkpoint = run.resume(8, {})
        assert checkpoint is not None
        assert checkpoint["round"] == 5
        assert "checkpoint.pt is damaged: the previous one, of round 5, is used" in capsys.readouterr().err


def garbled(content: bytes, chance: random.Random) -> bytes:
    """With a part of it replaced by random bytes."""
    start = chance.randrange(len(content))
    middle = chance.randbytes(min(chance.randrange(1, 200), len(content) - start))
    return content[:start] + middle + content[start + len(middle) :]


def with_nuls(content: bytes, chance: random.Random) -> bytes:
    """With NUL bytes from somewhere to its end, as a power failure leaves a file that was not flushed."""
    return content[: chance.randrange(len(content))].ljust(len(content), b"\0")


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": lambda content, chance: content[: chance.randrange(len(content))],
    "emptied": lambda content, chance: b"",
    "garbled": garbled,
    "with NULs": with_nuls,
    "doubled": lambda content, chance: content * 2,
}
RECORDS = ("config.json", "metrics.jsonl", "checkpoint.pt", "checkpoint-before.pt", "model.pt", "summary.json")
EVERY = [(name, file, damage) for name in ("part", "whole") for file in RECORDS for damage in DAMAGES]


def damage_and_run(stopped: Config, tmp_path: Path, name: str, file: str, damage: str, chance: random.Random) -> None:
    config = copied(stopped, name, tmp_path)
    path = tmp_path / name / file
    if path.exists():
        path.write_bytes(DAMAGES[damage](path.read_bytes(), chance))
    assert "\n" not in right_or_one_line(config, stopped)


@pytest.mark.parametrize(("name", "file", "damage"), random.Random(2026).sample(EVERY, 12))
def test_a_damaged_file_of_a_run_is_noticed_or_no_matter(
    stopped: Config, tmp_path: Path, name: str, file: str, damage: str
) -> None:
    damage_and_run(stopped, tmp_path, name, file, damage, random.Random(1))


@pytest.mark.chaos
@pytest.mark.parametrize(("name", "file", "damage"), EVERY)
def test_any_damage_of_any_file_of_a_run_is_noticed_or_no_matter(
    stopped: Config, tmp_path: Path, name: str, file: str, damage: str
) -> None:
    for seed in range(4):
        damage_and_run(stopped, tmp_path, name, file, damage, random.Random(seed))


@pytest.mark.chaos
def test_no_run_resumed_after_a_flipped_bit_ends_with_another_model(stopped: Config, tmp_path: Path) -> None:
    chance = random.Random(2026)
    for _ in range(66):
        config = copied(stopped, "part", tmp_path)
        path = tmp_path / "part" / chance.choice(["checkpoint.pt", "checkpoint.pt", "metrics.jsonl"])
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        assert "\n" not in right_or_one_line(config, stopped)


@pytest.mark.parametrize("limit", [0, 700, 300_000])  # not even config.json; none of its rows; no checkpoint
def test_where_a_file_cannot_grow_the_run_ends_and_resumes_when_it_can(
    stopped: Config, tmp_path: Path, limit: int
) -> None:
    config = stopped.changed({"results-dir": str(tmp_path), "name": "run", "checkpoint-every": 2})
    process = _started(config, quiet=True, limit=limit)
    process.join(120)
    assert process.exitcode in (UserError.exit_code, RunFailed.exit_code)
    (tmp_path / "run").mkdir(exist_ok=True)
    assert right_or_one_line(config, stopped) == ""


ON_DISKS = """
import json, shutil, subprocess, sys, traceback
from fedsim import cli
from fedsim.config import Config
from fedsim.errors import RunFailed
from fedsim.experiments.execute import execute
config = Config().changed(json.loads(sys.argv[1]))
def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", "disk"], check=True)
def end(kept):
    execute(config, "localsgd")
    shutil.copytree("disk/run", f"kept/{kept}")
    subprocess.run(["umount", "disk"], check=True)
for size, every in json.loads(sys.argv[2]):
    mount(f"size={size}")
    try:
        execute(config.changed({"checkpoint-every": every}), "localsgd")
        sys.exit(f"{size} bytes are enough")
    except RunFailed as error:
        print(*(frame.name for frame in traceback.extract_tb(error.__traceback__)), error)
    mount("remount,size=20m")
    end(f"{size}-{every}")
mount("size=20m")
execute(config.changed({"stop-after-rounds": 3}), "localsgd")
mount("remount,ro")
try:
    execute(config, "localsgd")
    sys.exit("it was written")
except RunFailed as error:
    print(error)
mount("remount,rw")
execute(config, "localsgd")
shutil.copytree("disk/run", "kept/read-only")
mount("remount,ro")
sys.argv = "run.py localsgd --resume run --results-dir disk".split()
cli.main()
"""


def test_whichever_write_fills_a_disk_and_where_it_is_read_only_the_run_resumes_when_it_can_be_written(
    stopped: Config, tmp_path: Path
) -> None:
    # With an outer step, which does nothing, the checkpoint is not as large as whole pages but for a few bytes
    config = stopped.changed({"momentum-at-sync": "reset", "outer": "sgd", "name": "reset"})
    whole = execute(config, "localsgd").folder
    page = resource.getpagesize()
    size = {path.name: -(-path.stat().st_size // page) * page for path in whole.iterdir()}
    begun = size["config.json"] + size["metrics.jsonl"]
    full = {  # bytes of the disk, and rounds between checkpoints
        "log_row": (size["config.json"], 8),
        "save_checkpoint": (begun + size["checkpoint.pt"] // 2, 8),
        "save_checkpoint ": (begun + size["checkpoint.pt"] * 3 // 2, 2),
        "save_model": (begun + size["checkpoint.pt"] + size["model.pt"] // 2, 8),
        "write_summary": (begun + size["checkpoint.pt"] + size["model.pt"], 8),
    }
    *lines, read_only, begins, finished = on_disks(config, tmp_path, list(full.values()))
    assert begins.endswith("/disk/run")
    assert finished.startswith("finished: test accuracy ")  # it is skipped on such a disk too
    for line, write in zip(lines, full, strict=True):
        assert write.strip() in line.split()
        assert "cannot be written (No space left on device): " in line
    assert read_only.startswith(f"{tmp_path}/disk/run cannot be written (Read-only file system): fix that; ")
    kept = list((tmp_path / "kept").iterdir())
    assert len(kept) == len(full) + 1
    for folder in kept:
        assert_same_bits(final_model(folder), final_model(whole))
        assert rows_of(folder) == rows_of(whole)


def on_disks(config: Config, place: Path, full: list[tuple[int, int]]) -> list[str]:
    """What `ON_DISKS` prints, in a namespace of its own where it can mount file systems on `place`/disk."""
    unshare = shutil.which("unshare")
    if not unshare or subprocess.run([unshare, "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], check=False).returncode:
        pytest.skip("no mounts can be made here")
    (place / "disk").mkdir()
    keys = json.dumps({**config.as_keys(), "results-dir": "disk", "name": "run"})
    command = [unshare, "-rm", sys.executable, "-c", ON_DISKS, keys, json.dumps(full)]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
