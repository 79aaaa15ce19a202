"""What is left when a run is killed, or its disk is full or read-only: all that was saved, and the way on."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsim.config import Config
from fedsim.device import resolve
from fedsim.experiments.execute import execute
from fedsim.records import read_rows
from tests.conftest import Execute, assert_same_bits, final_model, rows_of

ROOT = Path(__file__).parents[1]
KILLS = 50


def _run(config: Config) -> None:
    execute(config, "localsgd")


def _started(config: Config) -> multiprocessing.process.BaseProcess:
    """The run in a process of its own; the server that it is forked from has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedsim.experiments.execute", __name__])
    process = context.Process(target=_run, args=(config,))
    process.start()
    return process


@pytest.mark.chaos
def test_a_run_killed_at_fifty_random_moments_ends_bitwise_where_an_undisturbed_one_does(small: Config) -> None:
    """Each time by SIGKILL, in a process of its own, which goes on from what the one before it had saved."""
    keys = {"synthetic-images": 128, "clients": 2, "rounds": 100_000, "schedule": "cosine", "checkpoint-every": 1}
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


RUN = (
    f"{sys.executable} {ROOT}/run.py localsgd --dataset synthetic --synthetic-images 512 --model lenet5 "
    "--batch-size 16 --local-steps 2 --epochs 2 --device cpu --threads 1 --checkpoint-every 1 "
    "--results-dir disk --name run"
)
FULL = f"""
mount -t tmpfs -o size=1700k none disk
{RUN} && exit 91
[ $? = 1 ] || exit 92
mount -o remount,size=20m disk
{RUN} || exit 93
cp -r disk/run kept
"""
READ_ONLY = f"""
mount -t tmpfs none disk
{RUN} --stop-after-rounds 3 || exit 91
mount -o remount,ro disk
{RUN} && exit 92
[ $? = 1 ] || exit 93
mount -o remount,rw disk
{RUN} || exit 94
cp -r disk/run kept
"""


@pytest.mark.parametrize(
    ("script", "reason"), [(FULL, "No space left on device"), (READ_ONLY, "Read-only file system")]
)
def test_a_full_or_a_read_only_disk_ends_the_run_which_then_goes_on(
    run: Execute, tmp_path: Path, script: str, reason: str
) -> None:
    """On a file system of its own, in a namespace of its own, where the machine allows these."""
    unshare = shutil.which("unshare")
    if not unshare or subprocess.run([unshare, "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], check=False).returncode:
        pytest.skip("no mounts can be made here")
    (tmp_path / "disk").mkdir()
    done = subprocess.run(
        [unshare, "-rm", "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"error: {tmp_path}/disk/run cannot be written ({reason}): mend that" in done.stderr
    whole = run(name="whole", clients=4)
    assert_same_bits(final_model(tmp_path / "kept"), final_model(whole))
    assert rows_of(tmp_path / "kept") == rows_of(whole)
