"""The app as a federation of processes: a real SuperLink, real SuperNodes, on loopback, each bounded in time."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsim.flower import copy_app, end, environment, free_port, wait_until_healthy
from fedsim.machine import resolve
from fedsim.presets import configure
from fedsim.runs import execute
from tests.conftest import SMALL, assert_same_bits, final_model, rows_of

pytestmark = pytest.mark.deployment

KEYS = {**SMALL, "clients": 2, "rounds": 2, "synthetic-images": 256}


@contextlib.contextmanager
def started(command: list[str], env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process and all that it starts, ended afterwards."""
    tool = str(Path(sys.executable).with_name(command[0]))
    with log.open("wb") as output:
        process = subprocess.Popen([tool, *command[1:]], env=env, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        end(process)


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A SuperLink and two SuperNodes, each with its own shard; the environment to reach them by."""
    port, env, log = free_port(), environment(tmp_path), tmp_path / "link.log"
    (tmp_path / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    link = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
    with contextlib.ExitStack() as processes:
        wait_until_healthy(processes.enter_context(started(link, env, log)), port, log)
        for shard in (1, 0):
            node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
            node += ["--node-config", f"partition-id={shard} num-partitions=2"]
            processes.enter_context(started(node, env, tmp_path / f"node-{shard}.log"))
        yield env


def test_a_federation_of_processes_is_the_run_in_this_process_bitwise(
    federation: dict[str, str], tmp_path: Path
) -> None:
    place = {"results-dir": str(tmp_path), "name": "federation"}
    overrides = " ".join(
        f'{name}="{v}"' if isinstance(v, str) else f"{name}={v}" for name, v in {**KEYS, **place}.items()
    )
    command = [str(Path(sys.executable).with_name("flwr")), "run", str(copy_app(tmp_path / "app")), "here", "--stream"]
    done = subprocess.run([*command, "-c", overrides], env=federation, capture_output=True, text=True, timeout=200)
    assert (tmp_path / "federation" / "summary.json").exists(), done.stdout
    config = resolve(configure({**KEYS, **place, "name": "fleet"}), "localsgd")
    fleet = execute(config, "localsgd")
    assert_same_bits(final_model(tmp_path / "federation"), final_model(fleet))
    assert rows_of(tmp_path / "federation") == rows_of(fleet)
