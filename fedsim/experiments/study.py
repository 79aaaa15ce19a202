"""Studies: named lists of cells to run, read from a TOML file or made from the flags of a grid.

    title = "..."
    mode = "localsgd"                 or "centralized"
    question = "..."                  that it answers; studies with one question are listed together
    about = "outer"                   the key that it asks about (default: local-steps, else the first of the grid)
    together = "..."                  "NAME: ...", of the one table that all studies with it share (default: none)
    twins = true                      add the large-batch baseline of each K (default: false)
    compare = "table1"                the table of ``paper.csv`` to compare the results with (default: none)

    [grid]                            a cell for each combination of these values, which is run with every seed
    clients = [4, 12]
    seed = [1, 2, 3]

    [set]                             keys of every cell
    [[case]]                          further keys of the cells that match `when`; later cases override earlier ones
    when = { optimizer = ["lamb"] }
    set = { lr = 0.02 }

    [[also]]                          every cell of the grid once more, with these keys changed
    outer = "diloco"

    [tune]                            choose keys for each cell before it is run with every seed (see `tune`)
    validation = 5000                 training images held out, on which the trials are tested
    seed = 1                          the seed of all trials
    budget = 0.25                     a trial's part of the cell's epochs or rounds (default: 1)
    stop-below = 0.5                  stop trials below this part of the best accuracy (default: 0.5; 0: stop none)
    grid = { lr = [0.01, 0.03, 0.1] } a trial for each combination of these values

    [chosen]                          keys of single cells, by name without the seed; tuning stores its choice here
    k4-j10 = { lr = 0.03 }

In result tables the first key of the grid has the columns and the others have the rows. A preset is a study
without its grid.
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedsim.config import Config, Mode, Value, typed
from fedsim.config.messages import KINDS
from fedsim.errors import UserError
from fedsim.federation.decisions import planned
from fedsim.runs.folder import default_name, run_folder
from strategies.arguments import kebab, split_name

FOLDER = Path(__file__).parents[1] / "studies"
STORED = "study.toml"  # the study that was run, in the folder of its runs
TRIALS = "tuning.csv"  # all trials of its tuning, in the same folder
TUNING = "-tuning"  # suffix of the folder of a study's trials
LARGE_BATCH = "large batch"  # in the coordinates of a baseline, instead of J
SHORT_NAMES = {"clients": "k", "local-steps": "j", "batch-size": "b"}
NOT_TUNED = ("seed", "validation", "epochs", "rounds", "device", "threads", "evaluate-every", "record-by")
ALSO = "method"  # the axis of what `also` changes, and in the coordinates of a cell what that is, or:
PLAIN_CELL = "as set"
RECORD_KEYS = ("name", "results-dir", "resume")  # they follow from the names of the study and the cell


class Cell(NamedTuple):
    """One run of a study: its coordinates in the table (a value for each axis), its mode and its configuration."""

    coords: tuple[Value, ...]
    mode: Mode
    config: Config

    @property
    def name(self) -> str:
        """The name of the run without its seed."""
        return self.config.name.rpartition("-seed")[0]

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return run_folder(self.config, self.mode)


def _settings(settings: dict[str, Any]) -> dict[str, Any]:
    for name in RECORD_KEYS:
        if name in settings:
            raise UserError(f"set {name}: a study cannot set it, as its runs are in RESULTS/STUDY/CELL: leave it out")
    return {name: typed(name, value) for name, value in settings.items()}


def _lists(lists: dict[str, list[Any]]) -> dict[str, list[Any]]:
    found = {name: [typed(name, value) for value in values] for name, values in lists.items()}
    for name, values in found.items():
        if not values:
            raise UserError(f"{name} = [] is empty: give it one value or more")
        if twice := [value for value in values if values.count(value) > 1]:
            raise UserError(f"{name} = {values!r} has {twice[0]!r} twice: leave one of them out")
    return found


Settings = Annotated[dict[str, Any], AfterValidator(_settings)]
Lists = Annotated[dict[str, list[Any]], AfterValidator(_lists)]


class Case(BaseModel):
    """Settings of the cells that match `when`, that is, have one of the listed values of each of its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    when: Lists
    settings: Settings = Field(alias="set")


class Tune(BaseModel):
    """How to choose keys for each cell: trials of the values in `grid`, tested on held-out training images."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    grid: Annotated[Lists, Field(min_length=1)]
    validation: int = Field(ge=1)
    seed: int = Field(Config().seed, ge=0)
    budget: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop_below: Annotated[float, Field(ge=0, le=1)] = Field(0.5, alias="stop-below")


class Study(BaseModel):
    """A valid study: each of its cells has a valid configuration and a unique name."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    name: str = Field(exclude=True)  # of its file, and of the folder of its results
    title: str
    mode: Mode
    question: str = ""
    about: str = ""
    together: str = ""
    twins: bool = False
    compare: str = ""
    grid: Lists = {}
    settings: Settings = Field({}, alias="set")
    also: list[Annotated[Settings, Field(min_length=1)]] = []
    cases: list[Case] = Field([], alias="case")
    tune: Tune | None = None
    chosen: dict[str, Settings] = {}

    @property
    def axes(self) -> tuple[str, ...]:
        """The keys of the grid, without the seed; with `also`, the first is which of these a cell has."""
        return (*([ALSO] if self.also else []), *(name for name in self.grid if name != "seed"))

    @property
    def compared(self) -> str:
        """The key whose values results compare; "" without axes."""
        return self.about or compared_axis(self.axes)

    @property
    def seeds(self) -> list[int]:
        """The seeds of every cell."""
        return [int(seed) for seed in self.grid.get("seed", [Config().seed])]

    @property
    def toml(self) -> str:
        """The TOML text of this study, from which `read_study` gives the same study."""
        return tomli_w.dumps(self.model_dump(by_alias=True, exclude_defaults=True))

    def configure(self, keys: Mapping[str, Any]) -> Config:
        """The defaults, overridden by the settings, by the cases that match, and by `keys`."""
        given = Config().changed({**self.settings, **keys}).as_keys()
        settings = dict(self.settings)
        for case in self.cases:
            if all(given[name] in values or _name(given[name]) in values for name, values in case.when.items()):
                settings |= case.settings
        return Config().changed(_override(settings, keys))

    def cells(self, seeds: Sequence[int] = (), keys: Mapping[str, Any] | None = None) -> list[Cell]:
        """Every cell with each of `seeds` (by default the study's); `keys` override its settings."""
        cells = []
        lists = {name: values for name, values in self.grid.items() if name != "seed"}
        combinations = itertools.product([{}, *self.also], *lists.values())
        for seed, (also, *values) in itertools.product(seeds or self.seeds, combinations):
            own = dict(zip(lists, values, strict=True))
            name = "-".join([*(_part(*item) for item in (own | also).items()), f"seed{seed}"])
            changes = {**(keys or {}), **also, **own, "seed": seed, "name": name}
            coords = (*([changed_keys(also)] if self.also else []), *values)
            cells.append(Cell(coords, self.mode, self.configure(changes)))
        if self.twins:
            cells = sorted(cells + _baselines(cells), key=lambda cell: cell.config.seed)
        return [cell._replace(config=cell.config.changed(self.chosen.get(cell.name, {}))) for cell in cells]

    def with_settings(self, keys: Mapping[str, Any], **entries: Any) -> Study:
        """This study with `keys` set in every cell, and the other `entries` (title, grid, ...) replaced."""
        cases: list[Any] = list(self.cases)
        if any(keys.keys() & case.settings.keys() for case in cases):
            cases.append({"when": {}, "set": dict(keys)})
        held = self.model_dump(by_alias=True)
        return _study({**held, "name": self.name, "set": _override(self.settings, keys), "case": cases, **entries})

    def with_also(self, texts: Sequence[str]) -> Study:
        """This study with further entries of `also`, each as `read_also` reads it."""
        return self.with_settings({}, also=[*self.also, *(read_also(text) for text in texts)]) if texts else self

    def in_precision(self, precision: str) -> Study:
        """This study in another `precision`, with the precision added to its name and title."""
        if "precision" in {*self.grid, *self.settings}.union(*(case.settings for case in self.cases)):
            raise UserError(f"{self.name}: the study sets its precision itself: leave out --precision")
        own = {"name": f"{self.name}-{precision}", "title": f"{self.title}, in {precision}"}
        return self.with_settings({"precision": precision}, **own)

    @model_validator(mode="after")
    def _check(self) -> Study:
        if self.compare not in ("", *(tables := paper_tables())):
            raise UserError(
                f"compare = {self.compare!r} is not a table of the paper: it must be one of {', '.join(tables)}"
            )
        for name in self.grid:
            if name.partition(".")[0] not in Config().identity(self.mode):
                raise UserError(f"grid {name}: results of mode {self.mode} do not depend on it: leave it out")
        if self.about not in ("", *self.axes):
            raise UserError(
                f"about = {self.about!r} is not a key of the grid: it must be one of {', '.join(self.axes)}"
            )
        entries = [changed_keys(also) for also in self.also]
        if len(set(entries)) < len(entries):
            raise UserError(f"also {max(entries, key=entries.count)}: it is there twice: leave one of them out")
        changed = {name for also in self.also for name in also}
        if "seed" in changed:
            raise UserError("also seed: it cannot be changed: give --seeds, or seed in the grid")
        if twice := self.grid.keys() & changed:
            raise UserError(f"also {min(twice)}: it is a key of the study's own grid: leave it out of one of them")
        if self.twins and (self.mode, self.axes) != ("localsgd", ("clients", "local-steps")):
            raise UserError("twins = true needs mode localsgd and a grid of clients and local-steps, in this order")
        cells = self.cells()
        if unknown := self.chosen.keys() - {cell.name for cell in cells}:
            raise UserError(f"chosen {min(unknown)}: the study has no such cell")
        if self.tune:
            self._check_tune(self.tune, cells)
        return self

    def _check_tune(self, tune: Tune, cells: Sequence[Cell]) -> None:
        for name in tune.grid:
            if name in self.grid:
                raise UserError(f"tune grid {name}: it is a key of the study's own grid: leave it out of one of them")
            if name in NOT_TUNED or name.partition(".")[0] not in Config().identity(self.mode):
                raise UserError(f"tune grid {name}: it cannot be chosen by accuracy: leave it out")
        for config in (cell.config for cell in cells):
            if config.validation:
                raise UserError("tune: the study sets validation itself: leave it out, or tune")


def _override(settings: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` overridden by `keys`; a budget in epochs also replaces one in rounds."""
    kept = {name: value for name, value in settings.items() if name != "rounds" or "epochs" not in keys}
    for name in [name for name in kept if "." in name]:  # the argument of a choice that `keys` give with it
        key, _, argument = name.partition(".")
        if argument in {kebab(pair.partition("=")[0]) for pair in split_name(str(keys.get(key, "")))[1].split(",")}:
            del kept[name]
    return {**kept, **keys}


def _name(value: Value) -> Value:
    """The name of a choice, without its arguments."""
    return split_name(value)[0] if isinstance(value, str) else value


def _part(name: str, value: Value) -> str:
    """The part of a cell's name for one axis, for instance k4."""
    return (
        value.replace("/", "_").replace(":", "-") if isinstance(value, str) else f"{SHORT_NAMES.get(name, name)}{value}"
    )


def _baselines(cells: Sequence[Cell]) -> list[Cell]:
    """The large-batch baseline of each K and seed: one machine with the batch of all K workers together."""
    baselines: dict[str, Cell] = {}
    for config in (cell.config for cell in cells):
        where = f"twins = true: clients = {config.clients}"
        epochs = config.epochs
        if config.rounds:
            plan = planned(config)
            epochs = float(plan.epoch(plan.rounds))
        name = f"k{config.clients}-twin-seed{config.seed}"  # the name in older results
        batch = config.clients_per_round * config.batch_size
        baseline = config.changed({"name": name, "batch-size": batch, "epochs": epochs})
        cell = Cell((config.clients, LARGE_BATCH), "centralized", baseline)
        for key, value in baselines.setdefault(name, cell).config.identity("centralized").items():
            if (other := baseline.as_keys()[key]) != value:
                raise UserError(
                    f"{where} has cells with {key} = {value} and {other}, but one baseline: give them the same"
                    + (", a budget in epochs instead of rounds" if key == "epochs" and config.rounds else "")
                )
        if not epochs.is_integer():
            raise UserError(f"{where} trains for {epochs:g} epochs, but a baseline needs whole ones: change the budget")
    return list(baselines.values())


def compared_axis(axes: Sequence[str]) -> str:
    """The axis that results compare unless the study says another: what `also` changes, J, or the first one.

    "" without axes.
    """
    if ALSO in axes:
        return ALSO
    return "local-steps" if "local-steps" in axes else "".join(axes[:1])


def changed_keys(also: Mapping[str, Any]) -> str:
    """What an entry of `also` changes, in the coordinates of its cells."""
    return " ".join(f"{key}={value}" for key, value in also.items()) or PLAIN_CELL


def read_also(text: str) -> dict[str, str]:
    """The keys in the text of --also, for instance ``outer=diloco momentum=0``; raises UserError."""
    pairs = [pair.partition("=") for pair in text.split()]
    if not pairs or not all(equals for _, equals, _ in pairs):
        raise UserError(f"also = {text!r} is not KEY=VALUE, several with spaces between: for instance outer=diloco")
    if len({key for key, _, _ in pairs}) < len(pairs):
        raise UserError(f"also = {text!r} gives a key twice: give each value an --also of its own")
    return {key: value for key, _, value in pairs}


def select(study: Study, cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The `cells` of `study` with names (without the seed) that match any of `patterns`; without patterns, all."""
    names = list(dict.fromkeys(cell.name for cell in cells))
    chosen: set[str] = set()
    for pattern in patterns or ["*"]:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise UserError(f"cells = {pattern!r} matches no cell of {study.name}: it has {', '.join(names)}")
        chosen.update(matching)
    return [cell for cell in cells if cell.name in chosen]


def configure(mode: Mode, keys: Mapping[str, Any], preset: str = "") -> Config:
    """The configuration of one run: the defaults, overridden by the preset, overridden by `keys`."""
    config = Config().changed(keys)  # even with a preset, to report errors in `keys` first
    _check_budget(keys)
    return read_preset(preset, mode).configure(keys) if preset else config


def _check_budget(keys: Mapping[str, Any]) -> None:
    """Raise UserError where `keys`, all given in one place, have two budgets."""
    if "epochs" in keys and typed("rounds", keys.get("rounds", 0)):
        raise UserError(f"epochs = {keys['epochs']} is not used with rounds = {keys['rounds']}: leave one of them out")


def read_preset(name: str, mode: Mode) -> Study:
    """The study or TOML file `name`; raises UserError if it is not for `mode`."""
    if name not in study_names() and not name.endswith(".toml"):
        raise _unknown("preset", name)
    if (study := read_study(name)).mode != mode:
        others = ", ".join(other for other in study_names() if read_study(other).mode == mode)
        raise UserError(
            f"preset = {name} is for mode {study.mode}, not {mode}: give it to {study.mode}, or here one of {others}"
        )
    return study


def grid_study(grid: Mapping[str, Sequence[Value]], keys: Mapping[str, Any], preset: str = "") -> Study:
    """The study of LocalSGD over `grid`, with the settings of `preset` overridden by `keys`.

    Its name is the key ``name``, or is made from the keys that all cells share. It has no keys that do not affect
    results (threads, checkpoint-every, ...): pass these to `Study.cells`.
    """
    base = configure("localsgd", keys, preset)
    _check_budget({**keys, **{name: values[0] for name, values in grid.items() if values}})
    first = default_name(base.changed({"clients": 1, "local-steps": 1, "seed": 0}), "localsgd")
    others = "".join(f"-{key}" for key in grid if key not in ("clients", "local-steps", "seed"))
    name = base.name or f"grid{others}" + re.sub("-k1-(j1|e[0-9]+)-seed0", "", first.removeprefix("localsgd"))
    shared = base.identity("localsgd").keys() - {"device", "threads"}
    settings = {key: typed(key, value) for key, value in keys.items() if key in shared}
    empty = Study.model_construct(name=name, title=name, mode="localsgd")
    study = read_preset(preset, "localsgd") if preset else empty
    own = {"name": name, "title": name, "grid": {key: list(values) for key, values in grid.items()}}
    return study.with_settings(settings, **own, twins=False, compare="", tune=None)


def read_study(name: str) -> Study:
    """The study with this name, or in this TOML file, which may be one stored with its runs.

    Raises UserError, which names the file and the key.
    """
    if not name.endswith(".toml") and name not in study_names():
        raise _unknown("study", name)
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}): give the TOML file of a study") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name} is not TOML in UTF-8: {' '.join(str(error).split())}") from error
    try:
        known = [field.alias or key for key, field in Study.model_fields.items() if key != "name"]
        for entry in (entry for entry in entries if entry not in known):
            if entry in Config().as_keys() and entry not in RECORD_KEYS:
                raise UserError(f"{entry} is a key of runs: write it below [set], and title and mode above that")
            raise UserError(f"unknown entry {entry}: it must be one of {', '.join(known)}")
        if path.name == STORED:
            return _study({**entries, "name": path.absolute().parent.name})
        return _study({**entries, "name": typed("name", path.stem)})
    except (UserError, OverflowError) as error:
        raise UserError(" ".join(f"{path.name}: {error}".split())) from error


def _study(entries: Mapping[str, Any]) -> Study:
    """The study with these entries; raises UserError with the first error on one line."""
    try:
        return Study.model_validate(entries)
    except ValidationError as caught:
        error = caught.errors()[0]
        if cause := error.get("ctx", {}).get("error"):
            raise UserError(str(cause)) from None
        where = " ".join(map(str, error["loc"]))
        message = MESSAGES.get(error["type"], "= {}: " + error["msg"])
        raise UserError(f"{where} {message.format(repr(error['input']))}") from None


MESSAGES = {  # by the type of Pydantic's error
    "missing": "is missing",
    "extra_forbidden": "is unknown",
    **{kind: f"= {{}} is not {what}" for kind, what in KINDS.items()},
    "list_type": "= {0} is not a list: for instance [{0}]",
    "dict_type": "= {} is not a table",
    "model_type": "= {} is not a table",
    "too_short": "is empty: give a key with its values, for instance lr = [0.01, 0.1]",
}


def _unknown(what: str, name: str) -> UserError:
    near = difflib.get_close_matches(name, study_names(), n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return UserError(f"unknown {what} {name}: it must be one of {', '.join(study_names())}, or a file NAME.toml{hint}")


def study_names() -> list[str]:
    """The studies that come with fedsim."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def paper_tables() -> list[str]:
    """The tables of ``paper.csv``."""
    return sorted({line.split(",")[0] for line in (FOLDER / "paper.csv").read_text().splitlines()[1:]})
