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
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedsim.config import ARGUMENTS, BUDGET, FIELDS, Config, Mode
from fedsim.errors import UserError
from fedsim.system.files import atomic_write, open_file, read_file
from strategies.arguments import kebab

CONFIG, ROWS, MODEL, SUMMARY, LOCK = "config.json", "metrics.jsonl", "model.pt", "summary.json", ".lock"
TESTED_MODEL = "tested-model.pt"
CHECKPOINT, CHECKPOINT_BEFORE, CHECKPOINT_REFUSED = "checkpoint.pt", "checkpoint-before.pt", "checkpoint-refused.pt"
ROWS_REFUSED = "metrics-refused.jsonl"
OUTPUTS = (SUMMARY, CHECKPOINT, CHECKPOINT_BEFORE, CHECKPOINT_REFUSED, ROWS, ROWS_REFUSED, MODEL, TESTED_MODEL)
PARTIAL = re.compile(rf"\.({'|'.join(map(re.escape, (CONFIG, *OUTPUTS)))})\.\d+")  # left by a killed atomic_write
DIGEST = 6  # characters, at the end of a default name
LENGTH = ("epochs", "rounds")  # the keys by which a run can be lengthened
MACHINE = ("device", "threads")  # keys that are not part of a default name; runs of one cell may differ in them


def complete_record(held: Mapping[str, Any]) -> dict[str, Any]:
    """A record, which has a mode; keys that are newer than it have their defaults."""
    defaults = _default_record(held["mode"])
    arguments = {key: value for key, value in defaults[ARGUMENTS].items() if key not in held}
    return {**defaults, **held, ARGUMENTS: {**arguments, **held.get(ARGUMENTS, {})}}


def check_version(held: Mapping[str, Any]) -> None:
    """Raise UserError where a record has keys of an earlier version."""
    known = {"mode", BUDGET, ARGUMENTS, *map(kebab, FIELDS)}
    if older := sorted(held.keys() - known):
        raise UserError(
            f"its key {one_line(older[0])} is of another version of fedsim: fedsim migrate FOLDER rewrites older ones"
        )


@functools.cache
def _default_record(mode: Mode) -> dict[str, Any]:
    return {name: value for name, value in Config().record(mode).items() if name != BUDGET}


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
    for name in (BUDGET, ARGUMENTS):
        held.pop(name, None)
    longer: dict[str, Any] = {}
    for name, default in {**Config().identity("localsgd"), "name": ""}.items():
        given = config.as_keys()[name]
        if given != default and name in LENGTH:
            longer[name] = given
        elif given not in (default, held.get(name, config.resume)):
            other = one_line(held.get(name, config.resume))
            raise UserError(f"resume = {config.resume}: {name} = {given}, but the run has {other}: leave it out")
    try:
        return config.changed({**held, **longer, "name": config.resume, "resume": ""})
    except UserError as error:
        raise UserError(
            f"resume = {config.resume}: {folder / CONFIG} is not the configuration of a run: {one_line(error)}"
        ) from error


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys in which two configurations differ, sorted."""
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def run_folder(config: Config, mode: Mode) -> Path:
    """The folder of a run, named by the key ``name`` or else by `default_name`."""
    return Path(config.results_dir).expanduser().absolute() / (config.name or default_name(config, mode))


def has_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint to resume from; while one is written, it is the one before."""
    return any((folder / name).exists() for name in (CHECKPOINT, CHECKPOINT_BEFORE))


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


def is_locked(folder: Path) -> bool:
    """Whether a process holds the run's lock. This takes the lock for a moment: do not ask while a run begins."""
    try:
        with open_file(folder / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # else it has none, or it cannot be read
        return isinstance(error, BlockingIOError)
    return False


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a run, with its ``mode``; keys that are newer than the run have their defaults."""
    path = folder / CONFIG
    held = read_json(path, "restore it, or give another --name or --results-dir")
    mode = held.get("mode")
    if mode not in ("centralized", "localsgd"):
        raise UserError(f"{path} is damaged, it names no mode: restore it, or give another --name or --results-dir")
    try:
        check_version(held)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return complete_record(held)


@contextlib.contextmanager
def writable(results_dir: Path | str) -> Iterator[None]:
    """Context manager: an OSError becomes a UserError that names `results_dir`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"results-dir = {results_dir} cannot be written ({error.strerror}): give another --results-dir"
        ) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file by `content`, whole or not at all."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file; raises UserError with the `remedy` where it is damaged."""
    try:
        return parsed(read_file(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or cannot be read: {remedy}") from error


def parsed(content: bytes) -> dict[str, Any]:
    """The JSON object in `content`; raises ValueError if it is not one."""
    try:
        value = json.loads(content.decode())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    return value


def one_line(value: object) -> str:
    """`value` as short text on one line."""
    return " ".join(str(value).split())[:200]
