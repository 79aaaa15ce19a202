"""A run: its folder, opened to start it, to resume it, or to find it finished."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import torch
from pydantic import Field
from torch import Tensor

from fedsim.config import ARGUMENTS, Config, Mode
from fedsim.data.datasets import task_of
from fedsim.data.metric import Metric, metric_name
from fedsim.device import CORES, pool_size
from fedsim.errors import RunFailed, RunInProgress, UserError
from fedsim.runs.checkpoint_file import (
    InvalidCheckpoint,
    kind_of,
    mismatch,
    parse_checkpoint,
    seal,
    serialize,
)
from fedsim.runs.columns import Finite, Natural
from fedsim.runs.folder import (
    CHECKPOINT,
    CHECKPOINT_BEFORE,
    CHECKPOINT_REFUSED,
    CONFIG,
    LENGTH,
    LOCK,
    MODEL,
    OUTPUTS,
    PARTIAL,
    ROWS,
    ROWS_REFUSED,
    TESTED_MODEL,
    complete_record,
    differences,
    has_checkpoint,
    one_line,
    read_config,
    run_folder,
    writable,
    write_json,
)
from fedsim.runs.inputs import Inputs, check_inputs, check_own_data, inputs_of, warn_of_versions
from fedsim.runs.records import (
    ROW_VERSION,
    Row,
    each_row,
    outcome_of,
    read_summary,
    rows_content,
    sha256_of,
    verified_rows,
    verify_model,
    write_summary,
)
from fedsim.runs.rows_file import RowsFile
from fedsim.system.files import atomic_write, open_to_append, read_file
from fedsim.system.provenance import provenance

OnRow = Callable[[Row], None]
CHECKPOINT_VERSION = 7
HEADER = {  # of a checkpoint: what each entry is
    **dict.fromkeys(("round", "rows_bytes"), kind_of(Natural)),
    **{"seconds": kind_of(Annotated[Finite, Field(ge=0)]), "stacked": kind_of(bool), "rows_sha256": kind_of(str)},
}
OPTIONAL = {
    "own_data": kind_of(dict[str, dict[str, str]]),
    "code_changed_after": kind_of(list[Natural]),
    "groups": kind_of(Natural),
}


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

    @functools.cached_property
    def metric(self) -> Metric:
        """What the run is compared by."""
        return task_of(self._config).metric

    def metrics_of(self, tests: Mapping[str, float]) -> Row:
        """The columns of a row for what `evaluate` found; None where nothing was tested."""
        others = [f"test_{metric_name(choice.name)}" for choice in self._config.choices("metrics")]
        none = dict.fromkeys(("test_loss", self.metric.column, *others))
        return {**none, **{f"test_{name}": value for name, value in tests.items()}}

    @property
    def saved(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return has_checkpoint(self.folder)

    @property
    def of_own_code(self) -> bool:
        """Whether code of the user's own takes part."""
        return bool(self._inputs["code"])

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
        rows = rows_content(self.folder)
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
        row |= self.metric.record()
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
        """Write the summary of a run that has finished or stopped early. Its metric is None if nothing was tested."""
        with self._writing():
            rows_sha256 = self._rows.flush(read=True)
        summary = {
            "finished": finished,
            "tested_on": self.tested_on,
            **outcome_of(each_row(self.folder)),
            "parameters": parameters,
            **({"engine": self._engine} if self._engine else {}),
            **self._groups(),
            **provenance(device),
            **self._recorded_inputs(),
        }
        with self._writing():
            models = [name for name in (MODEL, TESTED_MODEL) if (self.folder / name).exists()]
            sha256 = {ROWS: rows_sha256, **{name: sha256_of(self.folder / name) for name in models}}
            write_summary(self.folder, summary, sha256)

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
                    write_summary(self.folder, {**summary, "finished": False}, digests)
                write_json(self.folder / CONFIG, self._identity)
            self._lengthens = False

    def _create_folder(self) -> None:
        """Check the folder, or create it with its configuration."""
        if self._check_folder():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked_file():  # another process may create it at the same time
            if not self._check_folder():
                write_json(self.folder / CONFIG, self._identity)

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
            first = next((name for name in differing if name not in (*LENGTH, ARGUMENTS)), differing[0])
            if first == ARGUMENTS:
                held, own = held[ARGUMENTS], own[ARGUMENTS]
                first = differences(held, own)[0]
            raise UserError(
                f"name = {self.folder.name}: {self.folder} holds a run of another configuration "
                f"({one_line(first)} = {one_line(held.get(first))}, not {one_line(own.get(first))}): "
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


def _round_of(path: Path) -> int | None:
    """The round of a checkpoint; None if it cannot be read."""
    with contextlib.suppress(OSError, InvalidCheckpoint):
        return parse_checkpoint(read_file(path)).get("round")
    return None
