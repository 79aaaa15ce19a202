"""Lengthen a run: continue a shorter one, if the steps that it has taken do not depend on its length."""

from __future__ import annotations

from fedsim.config import Config, Mode
from fedsim.errors import UserError
from fedsim.optim.lr_schedule import shape_of
from fedsim.runs.folder import CONFIG, LENGTH, differences, read_config, run_folder
from fedsim.runs.records import read_summary
from fedsim.runs.run import OnRow, Run
from fedsim.training.centralized import whole_epochs
from fedsim.training.local_steps import local_steps_schedule
from fedsim.training.round_starts import RoundStarts
from fedsim.training.run_plan import run_plan


def open_run(config: Config, mode: Mode, on_row: OnRow | None = None, engine: str = "") -> Run:
    """The run of `config` (resolved), even if its folder holds a shorter run, which is then continued.

    Its model will be bit for bit that of a run that had this length from the start; it may have one more row, where the
    shorter run ended. Raises UserError if the learning rates or J of the rounds already trained depend on the length.
    """
    return Run(config, mode, on_row, engine, lengthens=_lengthens(config, mode, engine))


def _lengthens(config: Config, mode: Mode, engine: str) -> bool:
    """Whether the run's folder holds one that differs only in its length; raises UserError if it cannot continue."""
    folder = run_folder(config, mode)
    if not (folder / CONFIG).is_file():
        return False
    held = read_config(folder)
    differing = differences(held, config.record(mode))
    if not differing or set(differing) - set(LENGTH):
        return False  # `Run` reports the difference
    shorter = config.changed({name: held[name] for name in LENGTH if name in held})
    trained_by = (read_summary(folder) or {}).get("engine", engine)
    if reason := _why_not(shorter, config, mode, trained_by, engine):
        raise UserError(f"name = {folder.name}: {folder} holds a run of {_length(shorter, mode)}: {reason}")
    return True


def _why_not(shorter: Config, longer: Config, mode: Mode, trained_by: str, engine: str) -> str:
    """Why a run of `shorter`, trained by one engine, cannot be lengthened to `longer` by another; empty if it can."""
    if engine and (trained_by == "stacked") != (engine == "stacked"):
        other = "stacked" if trained_by == "stacked" else "local"  # threads in earlier versions
        return f"it was trained by another engine: give --engine {other}, or another --name"
    if shape_of(longer).needs_length:
        return (
            f"with schedule = {longer.schedule} its rates depend on its length: give another --name to run a longer one"
        )
    if mode == "localsgd" and local_steps_schedule(longer).decides:
        schedule = longer.local_steps_schedule
        return f"J of its rounds was decided while it trained ({schedule}): give another --name to run a longer one"
    before, after = _starts(shorter, mode), _starts(longer, mode)
    if after.equal_rounds == before.equal_rounds:
        keys = " and ".join(f"{name} = {shorter.as_keys()[name]}" for name in LENGTH if name in longer.identity(mode))
        return f"it already has this length: give {keys}, or another --name or --results-dir"
    if after[-1] <= before[-1]:
        return "it can be lengthened, but not shortened: give more rounds or epochs, or another --name or --results-dir"
    if not before.begins(after):
        if longer.local_steps_schedule == "constant":
            return "its last round was cut to meet its epochs: give another --name to run a longer one"
        return f"J of its rounds depends on its length ({longer.local_steps_schedule}): give another --name"
    return ""


def _starts(config: Config, mode: Mode) -> RoundStarts:
    """The local step at which each round starts (centralized: the number of each epoch), and the end of the run."""
    return RoundStarts([(1, whole_epochs(config)[0])]) if mode == "centralized" else run_plan(config).starts


def _length(config: Config, mode: Mode) -> str:
    count = len(_starts(config, mode)) - 1
    return f"{count} {'epoch' if mode == 'centralized' else 'round'}{'s' * (count != 1)}"
