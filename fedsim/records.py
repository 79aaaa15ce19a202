"""A run's folder: its configuration, its rows, its checkpoint, its model and its summary.

    results/NAME/config.json     every key that affects the result, and the mode
                 metrics.jsonl   one row per round (centralized: per epoch), on disk before the next checkpoint
                 checkpoint.pt   what the run needs to resume bit for bit; checkpoint-before.pt is the previous one
                 model.pt        the last global model, a state_dict
                 tested-model.pt with test-model, what was tested in its place
                 summary.json    the outcome, its origin, and the SHA-256 of itself, metrics.jsonl and model.pt;
                                 like checkpoints, also those of the data set and of the user's own code
                 .lock           locked by the process that runs it

Files other than metrics.jsonl, which grows, are replaced atomically. A checkpoint file ends with its SHA-256, and the
checkpoint holds the SHA-256 of the rows before it: a run never resumes from a damaged checkpoint, or with rows that
have changed since. An invalid checkpoint and its rows are kept as checkpoint-refused.pt and metrics-refused.jsonl.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeGuard

import torch
from pydantic import Field
from torch import Tensor

from fedsim.checkpoint_file import (
    Count,
    Finite,
    InvalidCheckpoint,
    kind_of,
    mismatch,
    parse_checkpoint,
    seal,
    serialize,
)
from fedsim.config import BUDGET, CORES, Config, Mode, complete_record
from fedsim.device import pool_size
from fedsim.errors import RunFailed, RunInProgress, UserError
from fedsim.files import atomic_write, open_file, open_to_append, read_file
from fedsim.inputs import Inputs, check_inputs, check_own_data, inputs_of, warn_of_versions
from fedsim.provenance import provenance
from fedsim.rows_file import RowsFile

Row = dict[str, Any]
OnRow = Callable[[Row], None]
CHECKPOINT_VERSION = 5
ROW_VERSION = 2  # 1: without a version, and bytes_* held the overhead_bytes_* too
CONFIG, ROWS, MODEL, SUMMARY, LOCK = "config.json", "metrics.jsonl", "model.pt", "summary.json", ".lock"
TESTED_MODEL = "tested-model.pt"
CHECKPOINT, CHECKPOINT_BEFORE, CHECKPOINT_REFUSED = "checkpoint.pt", "checkpoint-before.pt", "checkpoint-refused.pt"
ROWS_REFUSED = "metrics-refused.jsonl"
OUTPUTS = (SUMMARY, CHECKPOINT, CHECKPOINT_BEFORE, CHECKPOINT_REFUSED, ROWS, ROWS_REFUSED, MODEL, TESTED_MODEL)
PARTIAL = re.compile(rf"\.({'|'.join(map(re.escape, (CONFIG, *OUTPUTS)))})\.\d+")  # left by a killed atomic_write
TRAFFIC = ("bytes_up", "bytes_down", "overhead_bytes_up", "overhead_bytes_down")
HEADER = {  # of a checkpoint: what each entry is
    **dict.fromkeys(("round", "rows_bytes"), kind_of(Count)),
    **{"seconds": kind_of(Annotated[Finite, Field(ge=0)]), "stacked": kind_of(bool), "rows_sha256": kind_of(str)},
}
OPTIONAL = {
    "own_data": kind_of(dict[str, dict[str, str]]),
    "code_changed_after": kind_of(list[Count]),
    "groups": kind_of(Count),
}
COSTS = ("epoch", "round", "steps_done", "syncs", *TRAFFIC, "updates_left_out")
RENAMED_COLUMNS = {"local_steps": "steps_done"}  # former name in rows and summaries -> the present one
DIGEST = 6  # characters, at the end of a default name
LENGTH = ("epochs", "rounds")  # the keys by which a run can be lengthened
MACHINE = ("device", "threads")  # keys that are not part of a default name; runs of one cell may differ in them


class Run:
    """One run's folder, opened to start the run, to resume it, or to find it finished."""

    def __init__(
        self,
        config: Config,
        mode: Mode,
        on_row: OnRow | None = None,
        engine: str = "",
        lengthens: bool = False,
    ) -> None:
        """Open the folder of `config` (resolved), created if it does not exist.

        Raises UserError if the folder holds another configuration, unless it differs only in `LENGTH` and this run
        `lengthens` it: then the folder gets this configuration once it is known that the run can be resumed. `on_row`
        is called with each row; the summary names the `engine` that trained the clients.
        """
        self._config = config
        self._engine = engine
        self._lengthens = lengthens
        self.folder = run_folder(config, mode)
        self.mode: Mode = mode
        self.tested_on = "validation" if config.validation else "test"
        self.on_row = on_row or (lambda row: None)
        self._identity = config.record(mode)
        with writable(config.results_dir):
            self._create_folder()
        self._rows = RowsFile(self.folder / ROWS)
        self._began = time.perf_counter()
        self._seconds_before = 0.0
        self._code_changed_after: list[int] = []  # the rounds after which changed code was accepted
        self.own_data: dict[str, dict[str, str]] = {}  # of each worker, the digests of images of its own, or none

    @functools.cached_property
    def _inputs(self) -> Inputs:
        return inputs_of(self._config)

    @property
    def finished(self) -> bool:
        """Whether the run has reached the end of its budget."""
        summary = read_summary(self.folder)
        return summary is not None and summary["finished"] and not self._lengthens

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of this run, including those before an interruption (up to the checkpoint)."""
        return self._seconds_before + time.perf_counter() - self._began

    @contextlib.contextmanager
    def lock(self, patience: float = 0.0) -> Iterator[None]:
        """Context manager: hold the run's lock; raises RunInProgress if it is not free after `patience` seconds."""
        with self._writing():
            file = self._locked_file(patience)
        with file:
            if self._lengthens:
                self._check_folder()  # again, as another process may have changed it
            yield

    def check_inputs(self) -> None:
        """Raise UserError where the finished run, or the last checkpoint, is of other data or code than there is now.

        A checkpoint that cannot be read is left to `resume`.
        """
        held = read_summary(self.folder) if self.finished else None
        with contextlib.suppress(OSError, InvalidCheckpoint):
            held = held or parse_checkpoint(read_file(self.folder / CHECKPOINT))
        check_inputs(self._config, self.folder.name, held or {}, self._inputs)

    def resume(self, rounds: int, like: Mapping[str, Any]) -> dict[str, Any] | None:
        """The checkpoint to resume from, if there is one; later rows are dropped.

        If the last one is invalid, this warns, puts it aside and uses the previous one. `rounds` (centralized: epochs)
        is the length of the whole run; a valid checkpoint has the keys and shapes of `like`.
        """
        rows = _read_rows(self.folder)
        refused: list[str] = []
        for name in (CHECKPOINT, CHECKPOINT_BEFORE):
            path = self.folder / name
            if not path.exists():
                continue
            try:
                checkpoint = self._read_checkpoint(path, rows, rounds, like)
            except InvalidCheckpoint as reason:
                refused.append(f"{path} {reason}")
                continue
            if checkpoint["stacked"] != (self._engine == "stacked"):
                other = "stacked" if checkpoint["stacked"] else "local"
                raise UserError(f"name = {self.folder.name}: it was trained by another engine: give --engine {other}")
            self._warn_of_groups(checkpoint)
            self._take_inputs(checkpoint)
            self._lengthen()
            if refused:
                self._put_aside(refused[0], checkpoint["round"], rows)
            self._truncate_rows(rows, checkpoint["rows_bytes"])
            self._seconds_before = checkpoint["seconds"]
            self._began = time.perf_counter()
            return checkpoint
        if refused:
            raise UserError(
                f"name = {self.folder.name}: {'; '.join(refused)}: there is no other checkpoint to resume from: "
                "give --rerun to run it again, or another --name"
            )
        if self._lengthens and (read_summary(self.folder) or {}).get("finished"):
            raise UserError(
                f"name = {self.folder.name}: the finished run has no checkpoint to resume from: give --rerun to run it "
                "again, or another --name"
            )
        self._lengthen()
        self._truncate_rows(rows, 0)
        return None

    def log_row(self, row: Row) -> None:
        """Append a row, with the seconds so far; numbers that are not finite are written as null."""
        row = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        row["tested_on"] = self.tested_on
        row["seconds"] = round(self.seconds, 3)
        line = (json.dumps({"version": ROW_VERSION, **row}, allow_nan=False) + "\n").encode()
        with self._writing():
            self._rows.append(line)
        self.on_row(row)

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Save what the run needs to resume after ``state["round"]`` rounds (centralized: epochs).

        The rows before it are flushed to disk first. The previous checkpoint stays, in case this one is damaged.
        """
        with self._writing():
            rows_sha256 = self._rows.flush()
        header = {
            "version": CHECKPOINT_VERSION,
            "config": self._identity,
            "seconds": self.seconds,
            "stacked": self._engine == "stacked",
            **self._groups(),
            "rows_bytes": self._rows.size,
            "rows_sha256": rows_sha256,
            **self._recorded_inputs(),
        }
        content = serialize({**header, **state})
        last = self.folder / CHECKPOINT
        with self._writing(), atomic_write(last) as file:
            file.write(content)
            file.write(seal(content))
            if last.exists():
                last.replace(self.folder / CHECKPOINT_BEFORE)

    def put_checkpoint_aside(self) -> None:
        """Put the last checkpoint aside, as no client can train from it; the run resumes from the one before, if any.

        If a checkpoint of the same round was put aside earlier, the one before it has led to it again: then that one is
        put aside too, and the run starts again.
        """
        last, before, refused = (self.folder / name for name in (CHECKPOINT, CHECKPOINT_BEFORE, CHECKPOINT_REFUSED))
        again = last.exists() and refused.exists() and _round_of(last) == _round_of(refused)
        for path in [last, before] if again else [last if last.exists() else before]:
            if path.exists():
                print(f"warning: no client can train from {path}: it is put aside", file=sys.stderr)
                with self._writing():
                    path.replace(refused)

    def save_model(self, state: Mapping[str, Tensor], name: str = MODEL) -> None:
        """Save the global model, or what was tested in its place, as a contiguous CPU state_dict."""
        content = serialize({name: value.detach().cpu().contiguous() for name, value in state.items()})
        with self._writing(), atomic_write(self.folder / name) as file:
            file.write(content)

    def write_summary(self, finished: bool, parameters: int, device: str) -> None:
        """Write the summary of a run that has finished or stopped early. Accuracies are None if nothing was tested."""
        with self._writing():
            rows_sha256 = self._rows.flush(read=True)
        summary = {
            "finished": finished,
            "tested_on": self.tested_on,
            **_outcome(_each_row(self.folder)),
            "parameters": parameters,
            **({"engine": self._engine} if self._engine else {}),
            **self._groups(),
            **provenance(device),
            **self._recorded_inputs(),
        }
        with self._writing():
            models = [name for name in (MODEL, TESTED_MODEL) if (self.folder / name).exists()]
            sha256 = {ROWS: rows_sha256, **{name: _sha256_of(self.folder / name) for name in models}}
            _write_summary(self.folder, summary, sha256)

    def check_outputs(self) -> None:
        """Raise UserError if rows or model of a finished run do not match its summary; warn if the model is missing."""
        verified_rows(self.folder)
        verify_model(self.folder)
        digests = (read_summary(self.folder) or {}).get("sha256", {})
        if MODEL in digests and not (self.folder / MODEL).exists():
            print(f"warning: {self.folder / MODEL} is missing: give --rerun to run it again", file=sys.stderr)

    def reset(self) -> None:
        """Remove the results of an earlier run of this configuration."""
        with self._writing():
            for name in OUTPUTS:
                (self.folder / name).unlink(missing_ok=True)

    def _recorded_inputs(self) -> dict[str, Any]:
        """What checkpoints and summaries hold of the run's inputs."""
        recorded: dict[str, Any] = {**self._inputs}
        if any(self.own_data.values()):
            recorded["own_data"] = self.own_data
        if self._code_changed_after:
            recorded["code_changed_after"] = self._code_changed_after
        return recorded

    def _take_inputs(self, checkpoint: Mapping[str, Any]) -> None:
        """Compare the inputs in the checkpoint with those of now, and take over what it says of them."""
        changed = check_inputs(self._config, self.folder.name, checkpoint, self._inputs)
        warn_of_versions(self.folder.name, checkpoint, self._inputs)
        self._code_changed_after = checkpoint.get("code_changed_after", []) + [checkpoint["round"]] * changed
        for worker, digests in checkpoint.get("own_data", {}).items():
            check_own_data(worker, digests, self.own_data.setdefault(worker, digests))

    def _groups(self) -> dict[str, int]:
        """How many stacked networks train the clients of a round, on which the last bits depend."""
        if self._engine != "stacked":
            return {}
        threads = pool_size(torch.device(self._config.device), self._config.threads)
        return {"groups": min(threads, self._config.clients_per_round)}

    def _warn_of_groups(self, checkpoint: Mapping[str, Any]) -> None:
        """Warn on one line where the clients were stacked in another number of groups so far."""
        for name, now in self._groups().items():
            if (before := checkpoint.get(name, now)) != now:  # checkpoints of older versions do not tell
                print(
                    f"warning: name = {self.folder.name}: engine = stacked trained the clients in {before} groups so "
                    f"far, one for each core, and does in {now} here: the last bits will differ from those of an "
                    f"uninterrupted run: set {CORES} as before, if they must not",
                    file=sys.stderr,
                )

    def _lengthen(self) -> None:
        """Make the folder's shorter run, if it holds one, an unfinished one of this configuration.

        The summary is replaced first: a finished one always is that of the configuration.
        """
        if self._lengthens:
            with self._writing():
                if summary := read_summary(self.folder):
                    digests = summary.pop("sha256", {})
                    _write_summary(self.folder, {**summary, "finished": False}, digests)
                _write_json(self.folder / CONFIG, self._identity)
            self._lengthens = False

    def _create_folder(self) -> None:
        """Check the folder, or create it with its configuration."""
        if self._check_folder():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked_file():  # another process may create it at the same time
            if not self._check_folder():
                _write_json(self.folder / CONFIG, self._identity)

    def _locked_file(self, patience: float = 0.0) -> BinaryIO:
        """The lock file, locked until it is closed. Partial files of killed processes are removed."""
        deadline = time.monotonic() + patience
        file = open_to_append(self.folder / LOCK)
        try:
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if time.monotonic() >= deadline:
                    raise RunInProgress(
                        f"name = {self.folder.name}: another process is running it: wait for it, or give another --name"
                    )
                time.sleep(1)
            for path in self.folder.iterdir():
                if PARTIAL.fullmatch(path.name):
                    path.unlink()
        except BaseException:
            file.close()
            raise
        return file

    def _check_folder(self) -> bool:
        """Whether the folder holds this run; raises UserError if it holds another run, or other files."""
        if not (self.folder / CONFIG).exists():
            found = self.folder.iterdir() if self.folder.exists() else ()
            if any(path.name != LOCK and not PARTIAL.fullmatch(path.name) for path in found):
                raise UserError(
                    f"name = {self.folder.name}: {self.folder} is not empty and not the folder of a run: "
                    "give another --name or --results-dir"
                )
            return False
        held, own = read_config(self.folder), self._identity
        differing = differences(held, own)
        if differing and not (self._lengthens and set(differing) <= set(LENGTH)):
            first = next((name for name in differing if name not in LENGTH), differing[0])
            raise UserError(
                f"name = {self.folder.name}: {self.folder} holds a run of another configuration "
                f"({_shown(first)} = {_shown(held.get(first))}, not {_shown(own.get(first))}): "
                "give another --name or --results-dir"
            )
        return True

    def _read_checkpoint(self, path: Path, rows: bytes, rounds: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """The checkpoint in `path`; raises InvalidCheckpoint if it does not match the run or its `rows`."""
        try:
            checkpoint = parse_checkpoint(read_file(path))
        except OSError as error:
            raise InvalidCheckpoint(f"cannot be read ({error.strerror})") from error
        if checkpoint.get("version") != CHECKPOINT_VERSION:
            raise InvalidCheckpoint("is of another version of fedsim")
        config = checkpoint.get("config")  # without the keys that are newer than it
        if not isinstance(config, dict) or config.get("mode") != self.mode:
            raise InvalidCheckpoint("is of another configuration")
        if set(differences(complete_record(config), self._identity)) - set(LENGTH):
            raise InvalidCheckpoint("is of another configuration")
        optional = {name: kind for name, kind in OPTIONAL.items() if name in checkpoint}
        if difference := mismatch(checkpoint, {**like, **HEADER, **optional}):
            raise InvalidCheckpoint(f"does not fit the run: {difference}")
        done, length = checkpoint["round"], checkpoint["rows_bytes"]
        if not 0 <= done <= rounds:
            raise InvalidCheckpoint(f"is of round {done}, of a run of {rounds}")
        if hashlib.sha256(rows[:length]).hexdigest() != checkpoint["rows_sha256"]:
            raise InvalidCheckpoint(f"and {ROWS} disagree: the rows up to round {done} have changed since it was saved")
        return checkpoint

    def _put_aside(self, refused: str, used: int, rows: bytes) -> None:
        """Warn that the last checkpoint is invalid and the previous one is used; store it and its rows beside them."""
        print(f"warning: {refused}: the previous one, of round {used}, is used", file=sys.stderr)
        with self._writing():
            with atomic_write(self.folder / ROWS_REFUSED) as file:
                file.write(rows)
            (self.folder / CHECKPOINT).replace(self.folder / CHECKPOINT_REFUSED)

    def _truncate_rows(self, rows: bytes, length: int) -> None:
        """Continue from the first `length` bytes of `rows`; the file is cut to them."""
        with self._writing():
            self._rows.begin(rows[:length])

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Context manager: an OSError, for instance of a full disk, becomes RunFailed; the checkpoint stays."""
        try:
            yield
        except OSError as error:
            raise RunFailed(
                f"{self.folder} cannot be written ({error.strerror}): fix that; the same command then resumes the run"
            ) from error


def config_of_run(config: Config) -> Config:
    """`config`, or the configuration of the run that its key ``resume`` names, under that run's name."""
    if not config.resume:
        return config
    folder = run_folder(config.changed({"name": config.resume}), "localsgd")
    if not os.path.exists(folder / CONFIG):
        raise UserError(
            f"resume = {config.resume}: there is no run in {folder}: give one's name, with its --results-dir"
        )
    held = read_config(folder)
    if held.pop("mode") != "localsgd":
        raise UserError(
            f"resume = {config.resume}: {folder} is not a run of LocalSGD: repeat the command that started it"
        )
    held.pop(BUDGET, None)
    longer: dict[str, Any] = {}
    for name, default in {**Config().identity("localsgd"), "name": ""}.items():
        given = config.as_keys()[name]
        if given != default and name in LENGTH:
            longer[name] = given
        elif given not in (default, held.get(name, config.resume)):
            other = _shown(held.get(name, config.resume))
            raise UserError(f"resume = {config.resume}: {name} = {given}, but the run has {other}: leave it out")
    try:
        return config.changed({**held, **longer, "name": config.resume, "resume": ""})
    except UserError as error:
        raise UserError(
            f"resume = {config.resume}: {folder / CONFIG} is not the configuration of a run: {_shown(error)}"
        ) from error


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys in which two configurations differ, sorted."""
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def run_folder(config: Config, mode: Mode) -> Path:
    """The folder of a run, named by the key ``name`` or else by `default_name`."""
    return Path(config.results_dir).expanduser().absolute() / (config.name or default_name(config, mode))


def default_name(config: Config, mode: Mode) -> str:
    """A name made from the configuration; it ends with a digest of the keys that affect the result.

    The digest leaves out keys with their default value, so that a key of a later version changes no name, and the keys
    in `MACHINE`: the same run has the same name on another machine, where it is refused.
    """
    defaults = Config().as_keys()
    identity = {k: v for k, v in config.identity(mode).items() if k not in MACHINE and v != defaults[k]}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:DIGEST]
    length = f"e{config.local_epochs}" if config.local_epochs else f"j{config.local_steps}"
    shape = f"-k{config.clients}-{length}" if mode == "localsgd" else ""
    return f"{mode}-{config.optimizer}-b{config.batch_size}{shape}-seed{config.seed}-{digest}"


def _round_of(path: Path) -> int | None:
    """The round of a checkpoint; None if it cannot be read."""
    with contextlib.suppress(OSError, InvalidCheckpoint):
        return parse_checkpoint(read_file(path)).get("round")
    return None


def is_locked(folder: Path) -> bool:
    """Whether a process holds the run's lock. This takes the lock for a moment: do not ask while a run begins."""
    try:
        with open_file(folder / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # else it has none, or it cannot be read
        return isinstance(error, BlockingIOError)
    return False


def verified_rows(folder: Path) -> list[Row]:
    """The rows of a run; raises UserError if it is finished and its summary was written with others.

    Summaries of older versions have no digests: only their numbers are compared with the rows.
    """
    rows, summary = read_rows(folder), read_summary(folder)
    if summary and summary["finished"]:
        _verify_sha256(folder, ROWS, summary)
        if any(summary.get(name, value) != value for name, value in _outcome(rows).items()):
            raise _not_its_own(folder, ROWS)
    return rows


def verify_model(folder: Path) -> None:
    """Raise UserError if the summary of a run was written with another model."""
    _verify_sha256(folder, MODEL, read_summary(folder) or {})


def _verify_sha256(folder: Path, name: str, summary: Mapping[str, Any]) -> None:
    sha256 = summary.get("sha256", {}).get(name)
    if sha256 and _differs(folder / name, sha256):
        raise _not_its_own(folder, name)


def _not_its_own(folder: Path, name: str) -> UserError:
    return UserError(
        f"name = {folder.name}: {folder / name} is not what {SUMMARY} was written with, one of them is damaged: "
        "restore it, or give --rerun to run it again"
    )


def read_rows(folder: Path) -> list[Row]:
    """The rows of a run, without a last line that was not completely written."""
    lines = _read_rows(folder).splitlines()
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(current_row(_parsed(line)))
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(
                f"{folder / ROWS} line {number} is damaged: restore it, or give --rerun to run it again"
            ) from error
    return rows


def _each_row(folder: Path) -> Iterator[Row]:
    """The rows of a run of this process, one by one, since there may be a million."""
    with open_file(folder / ROWS) as file:
        for line in file:
            yield current_row(_parsed(line))


def current_row(row: Row) -> Row:
    """`row`, a line of metrics.jsonl of any version, as rows are now; the version is left out."""
    for way in ("up", "down") if "version" not in row else ():
        whole, overhead = row.get(f"bytes_{way}"), row.get(f"overhead_bytes_{way}")
        if _is_number(whole) and _is_number(overhead):
            row = {**row, f"bytes_{way}": whole - overhead}
    return current_columns({name: value for name, value in row.items() if name != "version"})


def current_columns(record: Mapping[str, Any]) -> dict[str, Any]:
    """A row or summary, also of an older run, with the names of now."""
    return {RENAMED_COLUMNS.get(name, name): value for name, value in record.items()}


def _read_rows(folder: Path) -> bytes:
    """The content of metrics.jsonl."""
    path = folder / ROWS
    try:
        return read_file(path) if path.exists() else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): restore it, or give another --name") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a run, with its ``mode``; keys that are newer than the run have their defaults."""
    path = folder / CONFIG
    held = _read_json(path, "restore it, or give another --name or --results-dir")
    mode = held.get("mode")
    if mode not in ("centralized", "localsgd"):
        raise UserError(f"{path} is damaged, it names no mode: restore it, or give another --name or --results-dir")
    return complete_record(held)


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a run that has finished or stopped early, or None."""
    path = folder / SUMMARY
    if not path.exists():
        return None
    remedy = "restore it, or remove it: the same command then writes it again"
    summary = _read_json(path, remedy)
    valid = isinstance(summary.get("finished"), bool) and isinstance(digests := summary.get("sha256", {}), dict)
    if valid and summary["finished"]:
        valid = all(map(_is_number, map(summary.get, ("best_test_accuracy", "final_test_accuracy", "seconds"))))
    if valid and digests:  # summaries of older versions have none
        valid = digests.get(SUMMARY) == sha256_of_summary(summary)
    if not valid:
        raise UserError(f"{path} is damaged: {remedy}")
    summary = current_columns(summary)
    if "overhead_bytes_up" not in summary:  # its bytes may hold the overhead: those of the last row do not
        last = read_rows(folder)[-1:]
        summary |= {name: row[name] for row in last for name in TRAFFIC if name in row}
    return summary


@contextlib.contextmanager
def writable(results_dir: Path | str) -> Iterator[None]:
    """Context manager: an OSError becomes a UserError that names `results_dir`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"results-dir = {results_dir} cannot be written ({error.strerror}): give another --results-dir"
        ) from error


def _outcome(rows: Iterable[Row]) -> dict[str, Any]:
    """The accuracies, costs and seconds that a summary records of all rows of a run."""
    best, final, last = None, None, Row()
    for last in rows:
        if _is_number(tested := last.get("test_accuracy")):
            best, final = tested if best is None else max(best, tested), tested
    return {
        "best_test_accuracy": best,
        "final_test_accuracy": final,
        **{name: last.get(name, 0) for name in COSTS},
        "seconds": last.get("seconds", 0.0),
    }


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sha256_of(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_summary(summary: Mapping[str, Any]) -> str:
    """The SHA-256 of a summary without its digests, among which it is."""
    content = {name: value for name, value in summary.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _differs(path: Path, sha256: str) -> bool:
    """Whether the file exists and has another digest, or cannot be read."""
    try:
        return path.exists() and _sha256_of(path) != sha256
    except OSError:
        return True


def _write_summary(folder: Path, summary: Mapping[str, Any], sha256: Mapping[str, str]) -> None:
    """Write a summary with the digests of the files that it is of, if there are any, and of itself."""
    sealed = {"sha256": {**sha256, SUMMARY: sha256_of_summary(summary)}} if sha256 else {}
    _write_json(folder / SUMMARY, {**summary, **sealed})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        return _parsed(read_file(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or cannot be read: {remedy}") from error


def _parsed(content: bytes) -> dict[str, Any]:
    """The JSON object in `content`; raises ValueError if it is not one."""
    try:
        value = json.loads(content.decode())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    return value


def _shown(value: object) -> str:
    """`value` as short text on one line."""
    return " ".join(str(value).split())[:200]


def print_row(row: Row) -> None:
    """Round, epoch, rate, losses and accuracy of a row, on one line of at most 79 characters."""
    tested = ""
    if row["test_accuracy"] is not None:
        split = "test" if row["tested_on"] == "test" else "val"
        tested = f"{split} {loss_text(row['test_loss'])} {row['test_accuracy']:6.2%}"
    seconds = f"{row['seconds']:.{1 if row['seconds'] < 1000 else 0}f}"
    print(
        f"round {row['round']:>6}  epoch {row['epoch']:6.2f}  lr {row['lr']:.5f}  "
        f"train {loss_text(row['train_loss'])}  {tested:17}  {seconds:>5} s",
        flush=True,
    )


def outcome_line(summary: Mapping[str, Any]) -> str:
    """The last line of a finished run: accuracies, seconds, and how many updates were left out, if any."""
    tested_on, left_out = summary.get("tested_on", "test"), summary.get("updates_left_out", 0)
    line = f"finished: {tested_on} accuracy {summary['final_test_accuracy']:.2%}"
    line += f", best {summary['best_test_accuracy']:.2%}, {summary['seconds']:.1f} s"
    return line + (f"; {left_out:,} updates left out, see left_out in {ROWS}" if left_out else "")


def loss_text(value: float | None) -> str:
    """A loss in five characters, or more for a large one."""
    return "  nan" if value is None else f"{value:.3f}"
