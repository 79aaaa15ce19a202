"""One turn of a variant: time its rounds in a new process, with a time limit, and measure its peak memory."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from fedsim.bench.variants import VARIANTS
from fedsim.config import Config
from fedsim.errors import RunFailed
from fedsim.federation.flwr_run import CHECKOUT, environment
from fedsim.system.processes import cleanup, marked, running

SAMPLE_SECONDS = 0.5
LOG_LINES = 50  # of a turn that fails


@dataclass(frozen=True)
class Timing:
    """The timed rounds of one variant in one configuration."""

    variant: str
    config: Config
    seconds: list[float]  # of each round
    peak_bytes: int  # resident memory of all its processes, see `run_measured`; on a GPU, allocated memory of the GPU

    @property
    def images_per_second(self) -> float:
        """The images trained on in a round over the median of its seconds."""
        images = self.config.clients * self.config.local_steps * self.config.batch_size
        return images / statistics.median(self.seconds)

    def joined(self, other: Timing) -> Timing:
        """The rounds of both turns, of the same variant and configuration."""
        peak = max(self.peak_bytes, other.peak_bytes)
        return Timing(self.variant, self.config, [*self.seconds, *other.seconds], peak)


def take_turn(variant: str, config: Config, rounds: int, limit: float) -> Timing:
    """Time `rounds` rounds of a variant; raises RunFailed if it fails or runs for more than `limit` seconds in all.

    The variant gets a temporary folder and, if it uses Ray, a cluster of its own; afterwards all its processes are
    ended.
    """
    temporary = tempfile.TemporaryDirectory(prefix=".fs-")
    with cleanup(temporary.cleanup):
        folder = Path(temporary.name)
        result, log = folder / "result.json", folder / "log"
        task = {"variant": variant, "keys": config.as_keys(), "rounds": rounds, "result": str(result)}
        env = {
            **environment(folder, ray_address="local"),
            "TMPDIR": str(folder),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")])),
        }
        try:
            with log.open("wb") as output:
                command = [sys.executable, "-m", "fedsim.bench.turn", json.dumps(task)]
                peak = run_measured(command, env, output, limit)
            outcome: dict[str, Any] = {"error": "its process was killed"}
            if result.exists():
                outcome = json.loads(result.read_text())
            if "error" in outcome:
                raise RunFailed(outcome["error"])
        except RunFailed:
            print(*log.read_text(errors="replace").splitlines()[-LOG_LINES:], sep="\n", file=sys.stderr)
            raise
    on_gpu = config.device.startswith("cuda")
    return Timing(variant, config, outcome["seconds"], outcome["gpu"] if on_gpu else max(peak, outcome["memory"]))


def run_measured(command: Sequence[str], env: Mapping[str, str], output: IO[bytes], limit: float) -> int:
    """Run `command`, then end all processes that it has started; returns its peak memory in bytes.

    This is the maximum over time of the sum of VmHWM, the peak resident memory, over all running processes. A page that
    several processes share counts once for each. Zero without /proc.
    """
    deadline, peak = time.monotonic() + limit, 0
    with running(command, env, output) as (process, mark):
        while process.poll() is None:
            if time.monotonic() > deadline:
                raise RunFailed(f"not done within the time limit of {limit:g} s: give a larger --time-limit")
            peak = max(peak, sum(peak_memory(one.pid) for one in marked(mark)))
            time.sleep(SAMPLE_SECONDS)
    return peak


def peak_memory(pid: int) -> int:
    """The peak resident memory of a process in bytes; zero if it has ended.

    `ru_maxrss` would be wrong: a child process inherits it from its parent.
    """
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def main(task: Mapping[str, Any]) -> None:
    """Run the `task` of `take_turn` in this process, and write the outcome to its file `result`."""
    config = Config().changed(task["keys"])
    outcome: dict[str, Any] = {}
    try:
        outcome["seconds"] = VARIANTS[task["variant"]][0](config, task["rounds"])
        outcome["memory"] = peak_memory(os.getpid())
        outcome["gpu"] = torch.cuda.max_memory_allocated(config.device) if config.device.startswith("cuda") else 0
    except Exception as error:
        traceback.print_exc()
        outcome = {"error": f"{type(error).__name__}: {error}"}
    Path(task["result"]).write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
