"""fedsim from Python, for scripts and notebooks.

    import fedsim

    run = fedsim.localsgd(model="lenet5", dataset="synthetic", clients=12, local_steps=10)
    run.rows.plot(x="epoch", y="test_accuracy")

Keys are those of the command line, with underscores. So are the results: they are in the same folder, bit for bit the
same, and a run that is finished is read, not run again. Bad input raises `fedsim.UserError`, a run that fails
`fedsim.RunFailed`.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn

from fedsim.config import FIELDS, Config, Engine, has_key
from fedsim.config.messages import about, unknown
from fedsim.config.options import (
    CentralizedOptions,
    GridOptions,
    LocalSGDOptions,
    Options,
    StudyOptions,
    SweepOptions,
)
from fedsim.errors import UserError
from fedsim.experiments.execute import configured_run, execute
from fedsim.experiments.progress import each, is_live, live_line
from fedsim.experiments.study import Cell, Study, grid_study, read_study, select
from fedsim.experiments.sweep import fail_if_any, runner_of
from fedsim.experiments.track import check_tracker, tracker
from fedsim.experiments.tune import run_tuned_studies
from fedsim.models import cpu_model
from fedsim.runs.folder import CONFIG, MODEL, read_config, run_folder
from fedsim.runs.records import read_summary, verified_rows, verify_model
from fedsim.runs.run import OnRow
from strategies.arguments import kebab

if TYPE_CHECKING:  # slow to import, so a run begins first
    import pandas as pd
    from matplotlib.figure import Figure

    from fedsim.report.load import Records

Chosen = TypeVar("Chosen", bound=Options)


@dataclass(frozen=True, init=False)
class Result:
    """The result of a run, read from its folder when it is accessed."""

    folder: Path

    def __init__(self, folder: str | Path) -> None:
        """Open the run in `folder`; raises UserError if it holds none."""
        object.__setattr__(self, "folder", Path(folder).expanduser())
        if not (self.folder / CONFIG).is_file():
            raise UserError(f"{self.folder} is not the folder of a run: give one that holds a {CONFIG}")

    @property
    def rows(self) -> pd.DataFrame:
        """The rows of ``metrics.jsonl`` with its columns; accuracies are from 0 to 1.

        Raises UserError if the run is finished and its summary was written with other rows.
        """
        import pandas as pd

        from fedsim.report.load import with_types

        return with_types(pd.DataFrame(verified_rows(self.folder), dtype=object))

    @property
    def summary(self) -> dict[str, Any]:
        """``summary.json``; empty if the run has not ended.

        Best and final accuracy, costs, `updates_left_out`, device, commit, command.
        """
        return read_summary(self.folder) or {}

    @property
    def config(self) -> dict[str, Any]:
        """``config.json``: the mode and every key that shapes the result, in kebab-case."""
        return read_config(self.folder)

    @property
    def finished(self) -> bool:
        """Whether the run has reached the end of its budget."""
        return bool(self.summary.get("finished"))

    def state_dict(self) -> dict[str, Tensor]:
        """The global model; raises UserError if there is none, or the summary was written with another."""
        verify_model(self.folder)
        if not (self.folder / MODEL).exists():
            raise UserError(f"{self.folder} holds no {MODEL}: run it to its end, or with rerun=True if it is finished")
        state: dict[str, Tensor] = torch.load(self.folder / MODEL, map_location="cpu", weights_only=True)
        return state

    def model(self) -> nn.Module:
        """The network with the weights of the global model, on the CPU, in evaluation mode."""
        held = self.config
        network = cpu_model(Config().changed({name: held[name] for name in Config().identity(held["mode"])}))
        network.load_state_dict(self.state_dict())
        return network.eval()

    def plot(self) -> Figure:
        """What was tested against epochs, a panel for each column ``test_...`` of the rows."""
        from matplotlib.figure import Figure

        rows = self.rows
        names = [name for name in rows.select_dtypes("number") if name.startswith("test_") and rows[name].notna().any()]
        figure = Figure(figsize=(4 * max(len(names), 1), 3), layout="constrained")
        for panel, name in zip(figure.subplots(1, max(len(names), 1), squeeze=False)[0], names, strict=False):
            tested = rows[["epoch", name]].dropna()
            panel.plot(tested["epoch"], tested[name], marker="o", ms=3)
            panel.set(xlabel="epoch", ylabel=name)
        return figure


@dataclass(frozen=True, init=False)
class StudyResult:
    """The results of a study, read from its folder when they are accessed."""

    folder: Path

    def __init__(self, folder: str | Path) -> None:
        """Open the study in `folder`; raises UserError if it holds no runs."""
        object.__setattr__(self, "folder", Path(folder).expanduser())
        if not any(self.folder.rglob(CONFIG)):
            raise UserError(f"{self.folder} holds no runs: give the folder of a study")

    @property
    def runs(self) -> pd.DataFrame:
        """A row for each run: its keys with underscores, its accuracies and costs, `run` and `folder`.

        `local_steps` is the key, J; `steps_done` are the local steps of each client in the whole run.
        """
        from fedsim.report.load import with_types

        return with_types(self._records().runs.rename(columns=lambda name: name.replace("-", "_")))

    @property
    def rows(self) -> pd.DataFrame:
        """The rows of all runs; `run` is a run's index in `runs`."""
        return self._records().rows

    def _records(self) -> Records:
        """All records; a file that is damaged, or not what its summary was written with, is reported and left out."""
        from fedsim.report.load import read_records

        records = read_records(self.folder)
        for warning in records.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        return records

    def __getitem__(self, name: str) -> Result:
        """The run of this name, for instance ``k4-j10-seed1``."""
        return Result(self.folder / name)


def _documented(options: type[Options]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: add `options` and their keys to a function's signature and docstring, for help and completion."""
    parts = {"Options": options.in_python(), "Keys": options.keys_in_python()}

    def documented(function: Callable[..., Any]) -> Callable[..., Any]:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        lines = [inspect.cleandoc(function.__doc__ or "")]
        for title, fields in parts.items():
            lines += ["", f"{title}:"]
            for name, field in fields.items():
                own.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default))
                lines.append(f"    {name} = {field.default!r}: {about(field)}")
        function.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
        function.__doc__ = "\n".join(lines)
        return function

    return documented


@_documented(LocalSGDOptions)
def localsgd(*, on_row: OnRow | None = None, progress: bool = True, **arguments: Any) -> Result:
    """Train by LocalSGD: K clients, J local steps per round, then one average.

    `on_row`: is called with each row, a dict, by every engine but flower. `progress`: show the progress on a line, in a
    terminal or notebook. `model` and `dataset` may be functions that can be imported by name.
    """
    options, keys = _parted(LocalSGDOptions, arguments)
    return _run(options, keys, options.engine, on_row, progress)


@_documented(CentralizedOptions)
def centralized(*, on_row: OnRow | None = None, progress: bool = True, **arguments: Any) -> Result:
    """Train on one machine that has all images: the large-batch baselines. Arguments as in `localsgd`."""
    options, keys = _parted(CentralizedOptions, arguments)
    return _run(options, keys, "local", on_row, progress)


@_documented(GridOptions)
def grid(*, on_row: OnRow | None = None, progress: bool = True, **arguments: Any) -> StudyResult:
    """Run LocalSGD for each combination of the keys that are lists: ``grid(clients=[4, 12], lr=[0.01, 0.1])``.

    An array of NumPy or torch is a list too. `on_row` is called with each row, in which ``run`` is the name of its run.
    """
    crossed = {name: arguments.pop(name) for name in [*arguments] if _is_list(arguments[name])}
    lists = {kebab(name): [_plain(name, each) for each in value] for name, value in crossed.items()}
    options, keys = _parted(GridOptions, arguments)
    found = grid_study(lists, keys, options.preset)
    return _run_study(found, lambda study: study.cells(keys=keys), options, (on_row, progress))


@_documented(StudyOptions)
def study(name: str | Path, *, on_row: OnRow | None = None, progress: bool = True, **arguments: Any) -> StudyResult:
    """Run the study `name`, one of fedsim's or a TOML file: all cells, or those that match `cells`, with `seeds`.

    The keys override what the study sets. `on_row` as in `grid`; the rows of trials are among them.
    """
    options, keys = _parted(StudyOptions, arguments)
    found = read_study(str(name)).with_also(options.also)
    if options.precision:
        found = found.in_precision(options.precision)

    def cells_of(study: Study) -> list[Cell]:
        return select(study, study.cells(options.seeds, keys), options.cells)

    return _run_study(found, cells_of, options, (on_row, progress))


def _parted(options: type[Chosen], arguments: Mapping[str, Any]) -> tuple[Chosen, dict[str, Any]]:
    """The options among the `arguments`, and the others as keys; raises UserError for what is neither."""
    own = {
        name: [_plain(name, each) for each in value] if _is_list(value) else _plain(name, value)
        for name, value in arguments.items()
        if name in options.in_python()
    }
    others = {name: value for name, value in arguments.items() if name not in own}
    return options.of(own), as_keys(options, others)


def as_keys(options: type[Options], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments as keys in kebab-case; raises UserError for one that is no key of this function."""
    known = options.keys_in_python()
    for name in arguments:
        if name in FIELDS and not has_key(options.keys.mode, name):
            raise UserError(f"{name} is a key of localsgd alone: leave it out")
        if name.replace("-", "_") not in known:
            raise unknown(kebab(name), known)
    return {kebab(name): _plain(name, value) for name, value in arguments.items()}


def _plain(name: str, value: Any) -> Any:
    """`value` as a key holds it: a path or function as text, a number of NumPy or torch as Python's."""
    if isinstance(value, Path):
        return str(value)
    if callable(value):
        return _importable(name, value)
    return value.item() if hasattr(value, "item") and not _is_list(value) else value


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | range) or getattr(value, "ndim", 0) == 1


def _importable(name: str, function: Any) -> str:
    """The text ``module:function`` by which other processes can import `function`; raises UserError if they cannot."""
    module, path = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if module == "__main__" or found is not function:
        raise UserError(
            f"{name} = {path or type(function).__name__}: it cannot be imported by name: define it at the top of a "
            "file NAME.py of its own and import it from there"
        )
    return f"{module}:{path}"


def _run(
    options: CentralizedOptions, keys: Mapping[str, Any], engine: Engine, on_row: OnRow | None, progress: bool
) -> Result:
    mode = options.keys.mode
    config, chosen = configured_run(mode, keys, options.preset, engine)
    check_tracker(options.track, chosen)
    if on_row and chosen == "flower":
        raise UserError("on_row with engine = flower: its rows are written by another process: leave one out")
    folder = run_folder(config, mode)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_threads_kept())
        functions = [stack.enter_context(tracker(options.track, folder, config, mode)), *([on_row] if on_row else [])]
        console = Console(stderr=True)
        if progress and is_live(console) and chosen != "flower":
            functions.append(stack.enter_context(live_line(config, mode, console)))
        return Result(execute(config, mode, chosen, each(*functions), options.rerun).folder)


def _run_study(
    found: Study,
    cells_of: Callable[[Study], list[Cell]],
    options: SweepOptions,
    shown: tuple[OnRow | None, bool],
) -> StudyResult:
    """Run the cells; `shown`: the function that gets their rows, and whether progress is printed."""
    on_row, progress = shown
    results = Path(options.results_dir).expanduser().absolute()
    console = Console(stderr=True, markup=False, emoji=False, quiet=not progress)
    with _threads_kept():
        failed, cells = run_tuned_studies(
            [found], cells_of, results, runner_of(options, on_row), options.rerun, console
        )
    fail_if_any(failed, cells)
    return StudyResult(results / found.name)


@contextlib.contextmanager
def _threads_kept() -> Iterator[None]:
    """Context manager: restore the number of threads of torch, which a run sets to its own."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
