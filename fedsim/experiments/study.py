"""Studies: named settings and the cells to run them in, from the TOML files in ``fedsim/studies/``.

    title = "..."                     what the study asks
    mode = "localsgd"                 or "centralized"
    twins = true                      each K's large-batch twin beside the cells (default: false)
    compare = "table1"                the table of ``paper.csv`` to set beside the results (default: none)

    [grid]                            keys to cross: a cell for each combination, with every seed
    clients = [4, 12]
    seed = [1, 2, 3]

    [set]                             keys of every cell
    [[case]]                          keys of the cells to which `when` applies; later cases win over earlier ones
    when = { optimizer = ["lamb"] }
    set = { lr = 0.02 }

The first key of the grid runs across a table and the others down it. A preset is the same file without its grid.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fedsim.config import Config, Mode, Value, typed
from fedsim.errors import UserError

FOLDER = Path(__file__).parents[1] / "studies"
KEPT = "study.toml"  # the file as it was when its cells were run, beside them
TWIN = "large batch"  # what stands for J in the cell of a twin
SHORT = {"clients": "k", "local-steps": "j", "batch-size": "b"}


class Cell(NamedTuple):
    """One run of a study: its place in the table (a value for each axis), its mode and its configuration."""

    place: tuple[Value, ...]
    mode: Mode
    config: Config


@dataclass(frozen=True)
class Study:
    """One file, read and checked."""

    name: str
    title: str
    mode: Mode
    grid: Mapping[str, list[Value]] = field(default_factory=dict)
    settings: Mapping[str, Value] = field(default_factory=dict)
    cases: Sequence[Mapping[str, Any]] = ()
    twins: bool = False
    compare: str = ""
    text: str = ""  # of the file

    @property
    def axes(self) -> tuple[str, ...]:
        """The keys that tell its cells apart, the seed left out."""
        return tuple(name for name in self.grid if name != "seed")

    @property
    def seeds(self) -> list[int]:
        """The seeds of every cell."""
        return [int(seed) for seed in self.grid.get("seed", [Config().seed])]

    def configure(self, explicit: Mapping[str, Any]) -> Config:
        """The defaults, changed by the settings, by the cases that apply, and by the `explicit` keys."""
        config = Config().changed({**self.settings, **explicit})
        settings: dict[str, Any] = dict(self.settings)
        for case in self.cases:
            if all(config.as_keys()[name] in values for name, values in case["when"].items()):
                settings |= case["set"]
        if "epochs" in explicit:
            settings.pop("rounds", None)  # a budget in epochs replaces the study's budget in rounds
        return Config().changed({**settings, **explicit})

    def in_precision(self, precision: str) -> Study:
        """This study with its products in `precision`, under a name, a title and a file of its own."""
        if "precision" in (*self.grid, *self.settings):
            raise UserError(f"{self.name}: the study says in which precision it runs: leave out --precision")
        line = f'precision = "{precision}"\n'
        text = re.sub(r'(?m)^(title = ".*)"$', rf'\1, in {precision}"', self.text)
        text, tables = re.subn(r"(?m)^\[set\].*\n", rf"\g<0>{line}", text)
        text = text if tables else f"{text}\n[set]\n{line}"
        with _naming(Path(f"{self.name}.toml")):
            return _checked(f"{self.name}-{precision}", tomllib.loads(text), text)

    def cells(self, seeds: Sequence[int] = (), keys: Mapping[str, Any] | None = None) -> list[Cell]:
        """Every cell with every seed (`seeds`, or the file's own), named; `keys` win over the file's."""
        found = []
        crossed = [self.grid[name] for name in self.axes]
        for seed, values in itertools.product(seeds or self.seeds, itertools.product(*crossed)):
            own = dict(zip(self.axes, values, strict=True))
            name = "-".join([*(_part(*item) for item in own.items()), f"seed{seed}"])
            config = self.configure({**(keys or {}), **own, "seed": seed, "name": name})
            found.append(Cell(tuple(own.values()), self.mode, config))
        return sorted(found + _twins(found), key=lambda cell: cell.config.seed) if self.twins else found


def _part(name: str, value: Value) -> str:
    return value if isinstance(value, str) else f"{SHORT.get(name, name)}{value}"


def _twins(cells: Sequence[Cell]) -> list[Cell]:
    """SGD on one machine at the batch of all K workers together, over the same samples: one for each K and seed."""
    twins = {}
    for _, _, config in cells:
        name = f"k{config.clients}-twin-seed{config.seed}"
        keys = {"name": name, "batch-size": config.clients * config.batch_size}
        twins[name] = Cell((config.clients, TWIN), "centralized", config.changed(keys))
    return list(twins.values())


def read_study(name: str) -> Study:
    """The study of this name, or in this TOML file, or kept beside its runs.

    What it does not know fails, naming the file and the key.
    """
    path = Path(name) if name.endswith(".toml") and Path(name).is_file() else FOLDER / f"{name}.toml"
    if path.parent == FOLDER and path.stem not in study_names():
        raise UserError(f"unknown study {name}: it must be one of {', '.join(study_names())}, or a TOML file")
    with _naming(path):
        text = path.read_text()
        called = path.parent.name if path.name == KEPT else path.stem
        return _checked(called, tomllib.loads(text), text)


def study_names() -> list[str]:
    """The studies that fedsim brings."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def paper_tables() -> list[str]:
    """The tables of ``paper.csv``."""
    return sorted({line.split(",")[0] for line in (FOLDER / "paper.csv").read_text().splitlines()[1:]})


def _checked(name: str, held: dict[str, Any], text: str) -> Study:
    known = ("title", "mode", "twins", "compare", "grid", "set", "case")
    for other in held.keys() - set(known):
        raise UserError(f"unknown entry {other}: it must be one of {', '.join(known)}")
    for needed in ("title", "mode"):
        if needed not in held:
            raise UserError(f"{needed} is missing")
    if held["mode"] not in ("centralized", "localsgd"):
        raise UserError(f"mode = {held['mode']!r} is unknown: it must be one of centralized, localsgd")
    if not isinstance(held.get("twins", False), bool):
        raise UserError(f"twins = {held['twins']!r} is not true or false")
    if held.get("compare", "") not in ("", *(tables := paper_tables())):
        raise UserError(
            f"compare = {held['compare']!r} is no table of the paper: it must be one of {', '.join(tables)}"
        )
    cases = [{"when": _lists("when", case["when"]), "set": _typed(case["set"])} for case in _cases(held)]
    grid = _lists("grid", held.get("grid", {}))
    settings = _typed(held.get("set", {}))
    asked = {"twins": held.get("twins", False), "compare": held.get("compare", "")}
    study = Study(name, held["title"], held["mode"], grid, settings, cases, **asked, text=text)
    if study.twins and study.axes != ("clients", "local-steps"):
        raise UserError("twins = true needs a grid of clients and local-steps, in this order")
    study.cells()  # every value is in its range
    return study


def _cases(held: dict[str, Any]) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = held.get("case", [])
    if not isinstance(cases, list) or any(not isinstance(c, dict) or c.keys() != {"when", "set"} for c in cases):
        raise UserError("a [[case]] has a table when and a table set, and nothing else")
    return cases


def _typed(table: Mapping[str, Any]) -> dict[str, Value]:
    if not isinstance(table, Mapping):
        raise UserError(f"set = {table!r} is no table")
    return {name: typed(name, value) for name, value in table.items()}


def _lists(where: str, table: Mapping[str, Any]) -> dict[str, list[Value]]:
    if not isinstance(table, Mapping):
        raise UserError(f"{where} = {table!r} is no table")
    for name, values in table.items():
        typed(name, values[0] if isinstance(values, list) and values else values)
        if not isinstance(values, list) or not values:
            raise UserError(f"{where} {name} = {values!r} is no list: for instance {name} = [{values!r}]")
    return {name: [typed(name, value) for value in values] for name, values in table.items()}


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of a study begin with its file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path.name} is no TOML: {error}") from error
