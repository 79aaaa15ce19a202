"""Run cells in parallel on a Ray cluster or on one machine; the results are the same as one after the other.

A cell is a Ray task that uses a share of a node. If its node or process dies, Ray restarts the task, on another node if
necessary, and the run resumes from its checkpoint. All nodes share the results folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]
from ray.exceptions import RayError, RayTaskError
from rich.progress import Progress

import fedsim
import strategies
from fedsim.config import Config, Engine
from fedsim.device import CORES, cpu_count
from fedsim.errors import RunFailed, UserError
from fedsim.experiments.execute import execute, is_done, resolve_run
from fedsim.experiments.study import Cell
from fedsim.experiments.sweep import Failure, Outcome
from fedsim.experiments.track import check_tracker, tracker
from fedsim.federation.lengthen import open_run
from fedsim.runs.folder import CONFIG
from fedsim.runs.records import read_summary
from fedsim.system.private_ray import private_ray
from fedsim.system.provenance import origin

CODE_FOLDERS = [str(Path(package.__file__).parent) for package in (fedsim, strategies) if package.__file__]
CODE = hashlib.sha256(  # read at import: the files may change while the command runs
    b"".join(file.read_bytes() for folder in CODE_FOLDERS for file in sorted(Path(folder).rglob("*.py")))
).hexdigest()
MAX_RESTARTS = 10  # of a cell whose node or process dies
HEALTH_CHECK_SECONDS = 15
LOCK_SECONDS = 300  # a process that lost the cluster may hold the lock of its run this long
VISIBLE_SECONDS = 60  # a network file system may show with a delay what another node has written
STORE_BYTES = 100_000_000  # of Ray's object store, which cells do not use; the default is a third of the memory


@dataclass(frozen=True)
class OnRay:
    """Runs cells on the Ray cluster at `address`; if it is empty, at RAY_ADDRESS, or else on a new local Ray.

    A cell uses `cpus` cores (default: its key threads) and, with device cuda, the share `gpus` of a GPU (default: 1).
    It also sends its rows to the tracker `track`, if any.
    """

    engine: Engine
    address: str
    cpus: float | None = None
    gpus: float | None = None
    track: str = ""
    here = False

    @contextlib.contextmanager
    def started(self, cells: Sequence[Cell]) -> Iterator[None]:
        """Context manager: connect to the cluster, or start a local Ray, which is shut down at the end.

        Raises UserError if no node is large enough for one of `cells`.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the future default; without it Ray warns
        shares = [self._share(cell.config) for cell in cells]
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        own: dict[str, Any] = {}
        if address == "local":
            own = {"num_cpus": cpu_count(), "object_store_memory": STORE_BYTES}
        else:
            _check_address(address)
        on_sigterm = signal.getsignal(signal.SIGTERM)  # Ray replaces it
        with _private() if address == "local" else contextlib.nullcontext():
            try:
                ray.init(
                    address,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    runtime_env={"py_modules": CODE_FOLDERS, "env_vars": _environment()},
                    **own,
                )
                signal.signal(signal.SIGTERM, on_sigterm)
                for share in shares:
                    _check_room(share)
                yield
            finally:
                ray.shutdown()

    def run(self, cells: Sequence[Cell], rerun: bool, patience: float, progress: Progress) -> Iterator[Outcome]:
        """Run `cells` in parallel; see `OneByOne.run`."""
        tasks: dict[Future[Failure], Cell] = {}
        for cell in cells:
            try:
                run = open_run(cell.config, cell.mode)
                if rerun or not run.finished:
                    with run.lock(patience):
                        if rerun:
                            run.reset()  # not in the task, which has to resume if Ray restarts it
                if is_done(run):
                    yield cell, None
                else:
                    tasks[self._submit(cell)] = cell
            except (RunFailed, UserError) as error:
                yield cell, error
        while tasks:
            # not ray.wait, which loses exceptions of signal handlers
            ended, _ = wait(tasks, timeout=60, return_when=FIRST_COMPLETED)
            for task in ended:
                cell = tasks.pop(task)
                yield cell, _failure(task, cell)
            if not ended and not any(_has_room(self._share(cell.config)) for cell in tasks.values()):
                progress.console.print("no node of the cluster has room for a cell now: waiting for one to join it")

    def _submit(self, cell: Cell) -> Future[Failure]:
        share = self._share(cell.config)
        remote = _run_cell.options(num_cpus=share["CPU"], num_gpus=share["GPU"])
        future: Future[Failure] = remote.remote(cell, self.engine, self.track, share["CPU"], CODE).future()
        return future

    def _share(self, config: Config) -> dict[str, float]:
        """The resources of a node that a cell of `config` (resolved) uses."""
        if config.device not in ("cpu", "cuda"):
            raise UserError(
                f"device = {config.device}: with --ray it must be cpu or cuda, as Ray chooses the GPU of each cell"
            )
        gpus = (self.gpus or 1.0) if config.device == "cuda" else 0.0
        if self.gpus and not gpus:
            raise UserError(f"gpus-per-cell = {self.gpus}, but device = {config.device}: give --device cuda")
        return {"CPU": self.cpus or float(config.threads), "GPU": gpus}


@contextlib.contextmanager
def _private() -> Iterator[None]:
    """Context manager: the Ray that this process starts has the settings of `private_ray`.

    Ray has read its settings when it was imported, and is made to read them again, here and at the end.
    """
    own = private_ray()
    held = {name: os.environ.get(name) for name in own}
    in_clusters = ray_constants.ENABLE_RAY_CLUSTER
    try:
        os.environ.update(own)
        ray_constants.ENABLE_RAY_CLUSTER = False
        _read_settings()
        yield
    finally:
        for name, value in held.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})
        ray_constants.ENABLE_RAY_CLUSTER = in_clusters
        _read_settings()


def _read_settings() -> None:
    AuthenticationTokenLoader.instance().reset_cache()
    RayConfig.initialize("")


@ray.remote(max_retries=MAX_RESTARTS)
def _run_cell(cell: Cell, engine: Engine, track: str, cpus: float, code: str) -> Failure:
    """Run `cell` in a Ray task, on `cpus` cores of its node; returns why it failed, or None."""
    _, mode, config = cell
    here = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    if code != CODE:
        raise UserError(
            f"the fedsim in {CODE_FOLDERS[0]} on {here} differs from this command's: use the same commit on both"
        )
    if not (cell.folder / CONFIG).exists():
        raise UserError(
            f"results-dir = {config.results_dir} on {here} is another folder: give one that all nodes share"
        )
    os.environ[CORES] = str(math.ceil(cpus))
    try:
        config, engine = resolve_run(config, mode, engine)
        check_tracker(track, engine)  # it may be missing on this node
        with tracker(track, cell.folder, cell.config, cell.mode) as on_row:
            execute(config, mode, engine, on_row, patience=LOCK_SECONDS)
    except (RunFailed, UserError) as error:
        return error
    return None


def _failure(task: Future[Failure], cell: Cell) -> Failure:
    """Why the ended `task` of `cell` failed, or None. Raises UserError if the reason applies to all cells."""
    try:
        failure = task.result()
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
    except RayError as error:
        return RunFailed(f"its process died {MAX_RESTARTS + 1} times ({str(error).strip().splitlines()[0]})")
    if not failure and not _visible(cell.folder):
        return RunFailed(
            f"its records are not in results-dir = {cell.config.results_dir}: give a folder that all nodes share"
        )
    return failure


def _visible(folder: Path) -> bool:
    """Wait until the summary in `folder` can be read on this machine; False if it cannot within `VISIBLE_SECONDS`."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while read_summary(folder) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def _environment() -> dict[str, str]:
    """Environment variables of the cells: the commit and command to record, and the data folder."""
    inherited = {name: os.environ[name] for name in ("FEDSIM_ORIGIN", "FEDSIM_DATA") if os.environ.get(name)}
    return {"FEDSIM_ORIGIN": json.dumps(origin()), **inherited}


def _check_address(address: str) -> None:
    """Raise UserError if no cluster answers; ray.init would retry for minutes and then exit the process."""
    command = [str(Path(sys.executable).with_name("ray")), "health-check"]
    command += [] if address == "auto" else ["--address", address]
    try:
        subprocess.run(command, capture_output=True, check=True, timeout=HEALTH_CHECK_SECONDS)
    except (subprocess.SubprocessError, OSError):
        raise UserError(
            f"ray = {address}: no Ray cluster answers there: ray start --head, or give its host:port"
        ) from None


def _check_room(needed: dict[str, float]) -> None:
    """Raise UserError if no node is large enough for a cell that uses `needed`."""
    if not _has_room(needed):
        most = {kind: max((node.get(kind, 0.0) for node in _nodes()), default=0.0) for kind in needed}
        raise UserError(
            f"a cell uses {needed['CPU']:g} CPUs and {needed['GPU']:g} GPUs, which no node of the cluster has (at most "
            f"{most['CPU']:g} and {most['GPU']:g}): give less by --cpus-per-cell, --gpus-per-cell or --threads"
        )


def _has_room(needed: dict[str, float]) -> bool:
    return any(all(node.get(kind, 0.0) >= amount for kind, amount in needed.items()) for node in _nodes())


def _nodes() -> list[dict[str, Any]]:
    """The total resources of each node that is alive."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]
