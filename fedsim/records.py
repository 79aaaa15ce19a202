"""A run's folder: its configuration, its rows, its checkpoint, its model and its summary.

    results/NAME/config.json     every key that shapes the result, and the mode
                 metrics.jsonl   one row a round (centralized: an epoch), flushed as it is made
                 checkpoint.pt   what the run needs to go on, bitwise; beside it checkpoint-before.pt, the one before
                 model.pt        the last global model, a state_dict
                 summary.json    the outcome and where it comes from, written at the end or an early stop
                 .lock           held by the process that runs it

Files but the growing metrics.jsonl are written whole or not at all. Nothing else writes to a run's folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import io
import json
import math
import os
import pickle
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch
from torch import Tensor

from fedsim import __version__
from fedsim.config import Config, Mode
from fedsim.errors import RunFailed, UserError

Row = dict[str, Any]
CHECKPOINT_VERSION = 3
CHECKPOINT, CHECKPOINT_BEFORE, CHECKPOINT_REFUSED = "checkpoint.pt", "checkpoint-before.pt", "checkpoint-refused.pt"
COSTS = ("epoch", "round", "local_steps", "syncs", "bytes_up", "bytes_down")
PACKAGES = ("flwr", "torch", "torchvision", "torch-optimizer", "numpy")


class Run:
    """One run's folder, opened to begin the run, to go on with it, or to find it finished."""

    def __init__(self, config: Config, mode: Mode, show: Callable[[Row], None] | None = None) -> None:
        """Open the folder of `config` (resolved), created where it is not there yet.

        A folder that holds another configuration fails and stays as it is. `show` is called with each row.
        """
        self.folder = run_folder(config, mode)
        self.mode: Mode = mode
        self.tested_on = "validation" if config.validation else "test"
        self.show = show or (lambda row: None)
        self._identity = {"mode": mode, **config.identity(mode)}
        self._check_identity(config)
        self.rows: list[Row] = []
        self._began = time.perf_counter()
        self._seconds_before = 0.0

    @property
    def finished(self) -> bool:
        """Whether the run has come to the end of its budget."""
        summary = read_summary(self.folder)
        return summary is not None and summary["finished"]

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of this run, those before an interruption (up to the checkpoint) included."""
        return self._seconds_before + time.perf_counter() - self._began

    @contextlib.contextmanager
    def held(self, patience: float = 0.0) -> Iterator[None]:
        """Within it, this process alone runs the run; where another does, still after `patience` seconds, it fails."""
        deadline = time.monotonic() + patience
        with self._writing():
            file = (self.folder / ".lock").open("w")
        with file:
            while not _locked(file):
                if time.monotonic() >= deadline:
                    raise UserError(
                        f"name = {self.folder.name}: another process is running it: wait for it, or give another --name"
                    )
                time.sleep(1)
            yield

    def resume(self) -> dict[str, Any] | None:
        """The checkpoint to go on from, if there is one; rows made after it are dropped.

        One that is cut short, of another configuration or of another version is named and put aside, and the one
        before it is used.
        """
        refused = ""
        for path in (self.folder / CHECKPOINT, self.folder / CHECKPOINT_BEFORE):
            if not path.exists():
                continue
            try:
                checkpoint = self._checkpoint_in(path)
            except _Refused as reason:
                refused = f"{path} {reason}"
                continue
            if refused:
                print(
                    f"warning: {refused}: the one before it, of round {checkpoint['round']}, is used", file=sys.stderr
                )
                (self.folder / CHECKPOINT).replace(self.folder / CHECKPOINT_REFUSED)
            self._rewrite_rows([row for row in read_rows(self.folder) if row["round"] <= checkpoint["round"]])
            self._seconds_before = checkpoint["seconds"]
            self._began = time.perf_counter()
            return checkpoint
        if refused:
            raise UserError(f"name = {self.folder.name}: {refused}: remove it to begin the run anew")
        self._rewrite_rows([])
        return None

    def _checkpoint_in(self, path: Path) -> dict[str, Any]:
        try:
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            version, identity = checkpoint["version"], checkpoint.get("config")
        except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise _Refused("is damaged") from error
        if version != CHECKPOINT_VERSION:
            raise _Refused("is of another version of fedsim")
        if identity != self._identity:
            raise _Refused("is of another configuration")
        return checkpoint

    def add(self, row: Row) -> None:
        """Append a row, timed, and flush it; a number that is not finite is written as null."""
        row = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        row["tested_on"] = self.tested_on
        row["seconds"] = round(self.seconds, 3)
        with self._writing(), (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        self.rows.append(row)
        self.show(row)

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Save what the run needs to go on after ``state["round"]`` rounds (centralized: epochs).

        The last one is kept beside it, and is what the run goes on from where this one does not come to be.
        """
        last = self.folder / CHECKPOINT
        header = {"version": CHECKPOINT_VERSION, "config": self._identity, "seconds": self.seconds}
        with self._writing():
            if last.exists():
                last.replace(self.folder / CHECKPOINT_BEFORE)
            _save_whole(last, {**header, **state})

    def save_model(self, state: Mapping[str, Tensor]) -> None:
        """Save the global model as a contiguous CPU state_dict."""
        with self._writing():
            _save_whole(
                self.folder / "model.pt", {name: value.detach().cpu().contiguous() for name, value in state.items()}
            )

    def end(self, finished: bool, parameters: int, device: str) -> None:
        """Write the summary: of the whole run, or of one that stops early. Accuracies are None before any test."""
        tested = [row["test_accuracy"] for row in self.rows if row["test_accuracy"] is not None]
        last = self.rows[-1] if self.rows else {}
        summary = {
            "finished": finished,
            "tested_on": self.tested_on,
            "best_test_accuracy": max(tested, default=None),
            "final_test_accuracy": tested[-1] if tested else None,
            **{name: last.get(name, 0) for name in COSTS},
            "seconds": last.get("seconds", 0.0),
            "parameters": parameters,
            **provenance(device),
        }
        with self._writing():
            _write_json(self.folder / "summary.json", summary)

    def discard(self) -> None:
        """Forget a run of this same configuration, so that it is run again."""
        for name in ("summary.json", CHECKPOINT, CHECKPOINT_BEFORE, CHECKPOINT_REFUSED, "metrics.jsonl", "model.pt"):
            (self.folder / name).unlink(missing_ok=True)

    def _check_identity(self, config: Config) -> None:
        identity = self._identity
        defaults = Config().identity(self.mode)
        path = self.folder / "config.json"
        if path.exists():
            held = {**defaults, **_read_json(path)}  # a key that is younger than the run had its default's effect
            differing = [name for name in sorted(held.keys() | identity) if held.get(name) != identity.get(name)]
            if differing:
                first = differing[0]
                raise UserError(
                    f"name = {self.folder.name}: {self.folder} holds a run of another configuration "
                    f"({first} = {held.get(first)}, not {identity.get(first)}): give another --name or --results-dir"
                )
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.iterdir()):
                raise UserError(
                    f"name = {self.folder.name}: {self.folder} is not empty and no run's folder: "
                    "give another --name or --results-dir"
                )
            _write_json(path, identity)
        except OSError as error:
            raise UserError(
                f"results-dir = {config.results_dir} cannot be written ({error.strerror}): give another --results-dir"
            ) from error

    def _rewrite_rows(self, rows: list[Row]) -> None:
        self.rows = rows
        with self._writing(), written_whole(self.folder / "metrics.jsonl") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A full disk, or a folder that has become read-only, ends the run, whose checkpoint is kept."""
        try:
            yield
        except OSError as error:
            raise RunFailed(
                f"{self.folder} cannot be written ({error.strerror}): mend that; the same command then goes on"
            ) from error


class _Refused(Exception):
    """Why a checkpoint cannot be gone on from."""


def resumed(config: Config) -> Config:
    """`config`, or where its key ``resume`` names a run, that run's, to go on with under its name."""
    if not config.resume:
        return config
    folder = run_folder(config.changed({"name": config.resume}), "localsgd")
    if not (folder / "config.json").exists():
        raise UserError(
            f"resume = {config.resume}: there is no run in {folder}: give one's name, with its --results-dir"
        )
    held = {**Config().identity("localsgd"), **_read_json(folder / "config.json")}
    if held.pop("mode") != "localsgd":
        raise UserError(f"resume = {config.resume}: {folder} is no run of LocalSGD: start it again as it was begun")
    for name, default in {**Config().identity("localsgd"), "name": ""}.items():
        given = config.as_keys()[name]
        if given not in (default, held.get(name, config.resume)):
            other = held.get(name, config.resume)
            raise UserError(f"resume = {config.resume}: {name} = {given}, but the run has {other}: leave it out")
    return config.changed({**held, "name": config.resume, "resume": ""})


def _locked(file: TextIO) -> bool:
    """Whether this process has come to hold the lock on `file`."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def run_folder(config: Config, mode: Mode) -> Path:
    """The folder of a run: its name, or one made from what distinguishes it."""
    return Path(config.results_dir).expanduser().absolute() / (config.name or default_name(config, mode))


def default_name(config: Config, mode: Mode) -> str:
    """A name made from the configuration; its last part tells apart what the others do not show."""
    # The machine is left out, so that a run is found again (and refused, if it differs) under the same name
    identity = {k: v for k, v in config.identity(mode).items() if k not in ("device", "threads")}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:6]
    shape = f"-k{config.clients}-j{config.local_steps}" if mode == "localsgd" else ""
    return f"{mode}-{config.optimizer}-b{config.batch_size}{shape}-seed{config.seed}-{digest}"


def read_rows(folder: Path) -> list[Row]:
    """The rows of a run; a last line cut short by a broken-off run is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{path} line {number} is damaged: remove the folder to begin the run anew") from error
    return rows


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a run that has ended or stopped, or None."""
    path = folder / "summary.json"
    return _read_json(path) if path.exists() else None


def provenance(device: str) -> dict[str, Any]:
    """Where a result comes from: device, commit, command and versions."""
    cpu = platform.processor() or platform.machine()
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {
        "device": f"{device} ({name})",
        **(json.loads(os.environ.get("FEDSIM_ORIGIN", "null")) or origin()),
        "versions": {"python": platform.python_version(), "fedsim": __version__, **versions},
    }


def origin() -> dict[str, str]:
    """The commit of the checkout and the command of this process; a process started for it inherits both."""
    return {"commit": _commit(), "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}


def _commit() -> str:
    """The checkout's commit, with + where files differ from it; empty outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under `path` only when all of it is on the disk."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _save_whole(path: Path, content: Mapping[str, Any]) -> None:
    """`torch.save`, by way of memory: PyTorch's own writing hides why it failed."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    with written_whole(path) as file:
        file.write(buffer.getbuffer())


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with written_whole(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged or cannot be read: give another --name or --results-dir") from error
    return content


def print_row(row: Row) -> None:
    """Round, epoch, rate, losses and accuracy of a row, on one line."""
    tested = ""
    if row["test_accuracy"] is not None:
        tested = f"  {row['tested_on']} {row['test_accuracy']:6.2%} loss {_loss(row['test_loss'])}"
    print(
        f"round {row['round']:>4}  epoch {row['epoch']:7.2f}  lr {row['lr']:.5f}  "
        f"train loss {_loss(row['train_loss'])}{tested}  {row['seconds']:8.1f} s",
        flush=True,
    )


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
