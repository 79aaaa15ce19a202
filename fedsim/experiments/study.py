"""What to run: a study is a named list of cells, read from a TOML file or made from the flags of a grid.

    title = "..."                     what the study asks
    mode = "localsgd"                 or "centralized"
    twins = true                      add each K's large-batch twin (default: false)
    compare = "table1"                the table of ``paper.csv`` to compare the results with (default: none)

    [grid]                            keys to cross: a cell for each combination, run with every seed
    clients = [4, 12]
    seed = [1, 2, 3]

    [set]                             keys of every cell
    [[case]]                          keys of the cells that match `when`; later cases override earlier ones
    when = { optimizer = ["lamb"] }
    set = { lr = 0.02 }

The first key of the grid runs across a table and the others down it. A preset is a study without its grid.
"""

from __future__ import annotations

import fnmatch
import itertools
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedsim.config import Config, Mode, Value, current_names, typed
from fedsim.data.datasets import training_images
from fedsim.errors import UserError
from fedsim.records import default_name
from fedsim.training.run_plan import run_plan

FOLDER = Path(__file__).parents[1] / "studies"
KEPT = "study.toml"  # the study as it was run, beside its runs
TWIN = "large batch"  # stands for J in the place of a twin
SHORT = {"clients": "k", "local-steps": "j", "batch-size": "b"}
PLACES = ("name", "results-dir", "resume")  # keys that say where a run is recorded, which is up to the runner


class Cell(NamedTuple):
    """One run of a study: its place in the table (a value for each axis), its mode and its configuration."""

    place: tuple[Value, ...]
    mode: Mode
    config: Config


def _settings(settings: dict[str, Any]) -> dict[str, Any]:
    for name in PLACES:
        if name in settings:
            raise UserError(f"set {name}: a study cannot set it: its runs are in RESULTS/STUDY/CELL")
    return {name: typed(name, value) for name, value in settings.items()}


def _lists(lists: dict[str, list[Any]]) -> dict[str, list[Any]]:
    found = {name: [typed(name, value) for value in values] for name, values in lists.items()}
    for name, values in found.items():
        if not values or len(set(values)) < len(values):
            raise UserError(f"{name} = {values!r} must have one value or more, and none of them twice")
    return found


Settings = Annotated[dict[str, Any], AfterValidator(_settings)]
Lists = Annotated[dict[str, list[Any]], AfterValidator(_lists)]


class Case(BaseModel):
    """Settings of the cells that match `when`: each of its keys has one of the values listed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    when: Lists
    settings: Settings = Field(alias="set")


class Study(BaseModel):
    """A study, checked: each of its cells has a valid configuration and a name of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    name: str = Field(exclude=True)  # of its folder in the results; not written in its file
    title: str
    mode: Mode
    twins: bool = False
    compare: str = ""
    grid: Lists = {}
    settings: Settings = Field({}, alias="set")
    cases: list[Case] = Field([], alias="case")

    @property
    def axes(self) -> tuple[str, ...]:
        """The keys that distinguish its cells, without the seed."""
        return tuple(name for name in self.grid if name != "seed")

    @property
    def seeds(self) -> list[int]:
        """The seeds of every cell."""
        return [int(seed) for seed in self.grid.get("seed", [Config().seed])]

    @property
    def toml(self) -> str:
        """What `read_study` reads back as this study."""
        return tomli_w.dumps(self.model_dump(by_alias=True, exclude_defaults=True))

    def configure(self, keys: Mapping[str, Any]) -> Config:
        """The defaults, overridden by the settings, by the cases that match, and by `keys`."""
        given = Config().changed({**self.settings, **keys}).as_keys()
        settings = dict(self.settings)
        for case in self.cases:
            if all(given[name] in values for name, values in case.when.items()):
                settings |= case.settings
        return Config().changed(_override(settings, keys))

    def cells(self, seeds: Sequence[int] = (), keys: Mapping[str, Any] | None = None) -> list[Cell]:
        """Every cell with every seed (by default the study's), named; `keys` override its settings."""
        cells = []
        places = itertools.product(*(self.grid[name] for name in self.axes))
        for seed, place in itertools.product(seeds or self.seeds, places):
            own = dict(zip(self.axes, place, strict=True))
            name = "-".join([*(_part(*item) for item in own.items()), f"seed{seed}"])
            cells.append(Cell(place, self.mode, self.configure({**(keys or {}), **own, "seed": seed, "name": name})))
        return sorted(cells + _twins(cells), key=lambda cell: cell.config.seed) if self.twins else cells

    def with_settings(self, keys: Mapping[str, Any], **entries: Any) -> Study:
        """This study with `keys` set in every cell, and other `entries` (title, grid, ...) replaced."""
        cases: list[Any] = list(self.cases)
        if any(keys.keys() & case.settings.keys() for case in cases):
            cases.append({"when": {}, "set": dict(keys)})
        held = self.model_dump(by_alias=True)
        return _study({**held, "name": self.name, "set": _override(self.settings, keys), "case": cases, **entries})

    def in_precision(self, precision: str) -> Study:
        """This study in another `precision`, under a name and a title that say so."""
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
            if name not in Config().identity(self.mode):
                raise UserError(f"grid {name}: results of mode {self.mode} do not depend on it: leave it out")
        if self.twins and (self.mode, self.axes) != ("localsgd", ("clients", "local-steps")):
            raise UserError("twins = true needs mode localsgd and a grid of clients and local-steps, in this order")
        self.cells()
        return self


def _override(settings: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` overridden by `keys`, where a budget in epochs replaces one in rounds."""
    kept = dict(settings)
    if "epochs" in keys:
        kept.pop("rounds", None)
    return {**kept, **keys}


def _part(name: str, value: Value) -> str:
    return value if isinstance(value, str) else f"{SHORT.get(name, name)}{value}"


def _twins(cells: Sequence[Cell]) -> list[Cell]:
    """SGD on one machine at the batch of all K workers together, over the same samples: one for each K and seed."""
    twins: dict[str, Cell] = {}
    for cell in cells:
        config, where = cell.config, f"twins = true: clients = {cell.config.clients}"
        epochs = config.epochs
        if config.rounds:
            plan = run_plan(config, training_images(config))
            epochs = float(plan.epoch(plan.rounds))
        name = f"k{config.clients}-twin-seed{config.seed}"
        batch = config.clients_per_round * config.batch_size
        twin = config.changed({"name": name, "batch-size": batch, "epochs": epochs})
        first = twins.setdefault(name, Cell((config.clients, TWIN), "centralized", twin)).config
        for key, value in first.identity("centralized").items():
            if (other := twin.as_keys()[key]) != value:
                raise UserError(
                    f"{where} has cells of {key} = {value} and {other}, and one twin for all: give them the same"
                    + (", a budget in epochs instead of rounds" if key == "epochs" and config.rounds else "")
                )
        if not epochs.is_integer():
            raise UserError(f"{where} trains for {epochs:g} epochs, and a twin for whole ones: change the budget")
    return list(twins.values())


def select(study: Study, cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """Those of its `cells` whose names, without the seed, match one of the `patterns`; without any, all of them."""
    names = [cell.config.name.rpartition("-seed")[0] for cell in cells]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            known = ", ".join(dict.fromkeys(names))
            raise UserError(f"cells = {pattern!r} matches no cell of {study.name}: it has {known}")
    chosen = {name for pattern in patterns or ["*"] for name in fnmatch.filter(names, pattern)}
    return [cell for cell, name in zip(cells, names, strict=True) if name in chosen]


def configure(mode: Mode, keys: Mapping[str, Any], preset: str = "") -> Config:
    """The configuration of one run: the defaults, overridden by the preset, overridden by `keys`."""
    config = Config().changed(keys)  # errors of `keys` come first
    return read_preset(preset, mode).configure(keys) if preset else config


def read_preset(name: str, mode: Mode) -> Study:
    """The study `name`, to take settings for `mode` from."""
    if name not in study_names():
        raise UserError(f"unknown preset {name}: it must be one of {', '.join(study_names())}")
    if (study := read_study(name)).mode != mode:
        others = ", ".join(other for other in study_names() if read_study(other).mode == mode)
        raise UserError(
            f"preset = {name} is for mode {study.mode}, not {mode}: "
            f"give run.py {study.mode} --preset {name}, or here one of {others}"
        )
    return study


def grid_study(grid: Mapping[str, Sequence[Value]], keys: Mapping[str, Any], preset: str = "") -> Study:
    """The study of LocalSGD that crosses `grid`, with the settings of `preset` overridden by `keys`.

    Its name is the key ``name``, or one made from what all cells share. Keys that shape no result (threads,
    checkpoint-every, ...) are left out of it: give them to `Study.cells`.
    """
    base = configure("localsgd", keys, preset)
    first = default_name(base.changed({"clients": 1, "local-steps": 1, "seed": 0}), "localsgd")
    name = base.name or "grid" + first.removeprefix("localsgd").replace("-k1-j1-seed0", "")
    shared = base.identity("localsgd").keys() - {"device", "threads"}
    settings = {key: typed(key, value) for key, value in keys.items() if key in shared}
    empty = Study.model_construct(name=name, title=name, mode="localsgd")
    study = read_preset(preset, "localsgd") if preset else empty
    own = {"name": name, "title": name, "grid": {key: list(values) for key, values in grid.items()}}
    return study.with_settings(settings, **own, twins=False, compare="")


def read_study(name: str) -> Study:
    """The study of this name, or in this TOML file, or kept beside its runs; errors name the file and the key."""
    if not name.endswith(".toml") and name not in study_names():
        raise UserError(f"unknown study {name}: it must be one of {', '.join(study_names())}, or a file NAME.toml")
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}): give a TOML file of a study") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name} is not TOML in UTF-8: {' '.join(str(error).split())}") from error
    try:
        known = [field.alias or key for key, field in Study.model_fields.items() if key != "name"]
        for entry in entries.keys() - set(known):
            raise UserError(f"unknown entry {entry}: it must be one of {', '.join(known)}")
        if path.name == KEPT:
            return _study({**_as_called_now(entries), "name": path.absolute().parent.name})
        return _study({**entries, "name": path.stem})
    except (UserError, OverflowError) as error:
        raise UserError(" ".join(f"{path.name}: {error}".split())) from error


def _as_called_now(entry: Any) -> Any:
    """An entry of a study that was kept beside its runs, with the keys that have been renamed since."""
    if isinstance(entry, dict):
        return current_names({name: _as_called_now(value) for name, value in entry.items()})
    return [_as_called_now(each) for each in entry] if isinstance(entry, list) else entry


def _study(entries: Mapping[str, Any]) -> Study:
    """The study of these entries; the first error in one line."""
    try:
        return Study.model_validate(entries)
    except ValidationError as caught:
        error = caught.errors()[0]
        if cause := error.get("ctx", {}).get("error"):
            raise UserError(str(cause)) from None
        where = " ".join(map(str, error["loc"]))
        words = WORDS.get(error["type"], "= {}: " + error["msg"])
        raise UserError(f"{where} {words.format(repr(error['input']))}") from None


WORDS = {  # for Pydantic's own
    "missing": "is missing",
    "extra_forbidden": "is unknown: a [[case]] has a table when and a table set, and nothing else",
    "string_type": "= {} is not text",
    "bool_type": "= {} is not true or false",
    "list_type": "= {0} is not a list: for instance [{0}]",
    "dict_type": "= {} is not a table",
}


def study_names() -> list[str]:
    """The studies that come with fedsim."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def paper_tables() -> list[str]:
    """The tables of ``paper.csv``."""
    return sorted({line.split(",")[0] for line in (FOLDER / "paper.csv").read_text().splitlines()[1:]})
