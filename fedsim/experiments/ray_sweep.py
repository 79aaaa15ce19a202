"""Cells side by side on a Ray cluster, or on shares of this machine: the same runs as one by one.

A cell is a Ray task that takes a share of a node. Where its node or its process dies, Ray begins the task again,
elsewhere if need be, and the run goes on from its checkpoint. All nodes share the folder of results.
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
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from rich.console import Console

import fedsim
import strategies
from fedsim.config import CORES, Config, cpu_count
from fedsim.errors import RunFailed, UserError
from fedsim.experiments.cells import Spread
from fedsim.experiments.execute import Engine, execute
from fedsim.experiments.study import Cell
from fedsim.records import Run, origin, read_summary, run_folder

PACKAGES = [str(Path(package.__file__).parent) for package in (fedsim, strategies) if package.__file__]
CODE = hashlib.sha256(  # of this process, which may be older than what the files hold by now
    b"".join(file.read_bytes() for package in PACKAGES for file in sorted(Path(package).rglob("*.py")))
).hexdigest()
TRIES = 10  # further ones that a cell has when its node or its process dies
REACH_SECONDS = 15
LOCK_SECONDS = 300  # a process that is cut off from the cluster may hold its run for so long
VISIBLE_SECONDS = 60  # what a node has written is seen late on a network file system
STORE_BYTES = 100_000_000  # cells send each other nothing; Ray would take a third of the memory


@contextlib.contextmanager
def cluster(spread: Spread, cells: Sequence[Cell]) -> Iterator[None]:
    """Within it, this process is on the cluster of `spread`, a node of which has room for each of `cells`.

    A Ray that was started for it is ended with it; an existing one is left as it was.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns of it
    shares = [share(cell.config, spread) for cell in cells]
    address = spread.address or os.environ.get("RAY_ADDRESS") or "local"
    own: dict[str, Any] = {"num_cpus": cpu_count(), "object_store_memory": STORE_BYTES} if address == "local" else {}
    if not own:
        _check_address(address)
    asked_to_end = signal.getsignal(signal.SIGTERM)  # Ray puts its own in place of it
    try:
        ray.init(
            address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"py_modules": PACKAGES, "env_vars": _environment()},
            **own,
        )
        signal.signal(signal.SIGTERM, asked_to_end)
        for needed in shares:
            _check_room(needed)
        yield
    finally:
        ray.shutdown()


def run_on_ray(
    cells: Sequence[Cell], engine: Engine, rerun: bool, spread: Spread, console: Console
) -> Iterator[tuple[str, str]]:
    """Run all `cells` (placed) on the cluster; yields the name of each as it ends, and why it failed or nothing."""
    waiting = {}
    runs = [Run(config, mode) for _, mode, config in cells]  # none is begun where one's name is taken
    for cell, run in zip(cells, runs, strict=True):
        with run.lock():
            if rerun:
                run.reset()  # here, as a cell that is begun again goes on
        if run.finished:
            run.check_outputs()
            yield cell.config.name, ""
        else:
            needed = share(cell.config, spread)
            remote = _run_cell.options(num_cpus=needed["CPU"], num_gpus=needed["GPU"])
            waiting[remote.remote(cell, engine, needed["CPU"], CODE).future()] = cell
    while waiting:
        # Python's own wait: within Ray's, a signal's exception is lost
        ended, _ = wait(waiting, timeout=60, return_when=FIRST_COMPLETED)
        for task in ended:
            cell = waiting.pop(task)
            yield cell.config.name, _why_failed(task, cell)
        if not ended and not any(_has_room(share(cell.config, spread)) for cell in waiting.values()):
            console.print("no node of the cluster has room for a cell now: waiting for one to join it")


def share(config: Config, spread: Spread) -> dict[str, float]:
    """What a cell of `config` (resolved) takes of a node."""
    if config.device not in ("cpu", "cuda"):
        raise UserError(f"device = {config.device}: with --ray it must be cpu or cuda, of which Ray gives each a share")
    gpus = (spread.gpus or 1.0) if config.device == "cuda" else 0.0
    if spread.gpus and not gpus:
        raise UserError(f"gpus-per-cell = {spread.gpus}, but device = {config.device}: give --device cuda")
    return {"CPU": spread.cpus or float(config.threads), "GPU": gpus}


@ray.remote(max_retries=TRIES)
def _run_cell(cell: Cell, engine: Engine, cpus: float, code: str) -> str:
    """On a node: run `cell` on so many of its cores; returns why it failed, or nothing."""
    _, mode, config = cell
    here = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    if code != CODE:
        raise UserError(f"the fedsim in {PACKAGES[0]} on {here} is not the one that asks: bring it to the same commit")
    if not (run_folder(config, mode) / "config.json").exists():
        raise UserError(
            f"results-dir = {config.results_dir} on {here} is another folder: give one that all nodes share"
        )
    os.environ[CORES] = str(math.ceil(cpus))
    try:
        execute(config, mode, engine, patience=LOCK_SECONDS)
    except RunFailed as error:
        return str(error)
    return ""


def _why_failed(task: Future[str], cell: Cell) -> str:
    """Why the `task` that has ended failed, or nothing."""
    try:
        why = task.result()
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
    except RayError as error:
        return f"its process died {TRIES + 1} times ({str(error).strip().splitlines()[0]})"
    if not why and not _visible(run_folder(cell.config, cell.mode)):
        return f"its records are not in results-dir = {cell.config.results_dir}: give a folder that all nodes share"
    return why


def _visible(folder: Path) -> bool:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while read_summary(folder) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def _environment() -> dict[str, str]:
    """What cells have in their environment: where they come from, and where this process finds the data."""
    data = {name: value for name in ("FEDSIM_DATA",) if (value := os.environ.get(name))}
    return {"FEDSIM_ORIGIN": os.environ.get("FEDSIM_ORIGIN") or json.dumps(origin()), **data}


def _check_address(address: str) -> None:
    """Fail where no cluster answers; ray.init would try for minutes and end this process."""
    command = [str(Path(sys.executable).with_name("ray")), "health-check"]
    command += [] if address == "auto" else ["--address", address]
    try:
        subprocess.run(command, capture_output=True, check=True, timeout=REACH_SECONDS)
    except (subprocess.SubprocessError, OSError):
        raise UserError(
            f"ray = {address}: no Ray cluster answers there: ray start --head, or give its host:port"
        ) from None


def _check_room(needed: dict[str, float]) -> None:
    """Fail where a cell would wait for ever."""
    if not _has_room(needed):
        most = {kind: max((node.get(kind, 0.0) for node in _nodes()), default=0.0) for kind in needed}
        raise UserError(
            f"a cell takes {needed['CPU']:g} CPUs and {needed['GPU']:g} GPUs, which no node of the cluster has (the "
            f"most: {most['CPU']:g} and {most['GPU']:g}): give less by --cpus-per-cell, --gpus-per-cell or --threads"
        )


def _has_room(needed: dict[str, float]) -> bool:
    return any(all(node.get(kind, 0.0) >= amount for kind, amount in needed.items()) for node in _nodes())


def _nodes() -> list[dict[str, Any]]:
    """What each living node has in all."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]
