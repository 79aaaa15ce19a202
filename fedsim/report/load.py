"""Read the records of runs into data frames.

A file that cannot be read or does not match the schema below is left out with a warning. Keys that the schema does not
have are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import pandas as pd
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from fedsim.config import ARGUMENTS, Config, Mode, Value
from fedsim.data.metric import ACCURACY, metric_of
from fedsim.errors import UserError
from fedsim.registry import names_own
from fedsim.runs.columns import (
    LARGEST,
    Accuracy,
    Columns,
    Costs,
    Finite,
    MetricRecord,
    Natural,
    Tested,
    current_columns,
)
from fedsim.runs.folder import CONFIG, MACHINE, ROWS, SUMMARY, check_version, complete_record
from fedsim.runs.records import TRAFFIC, sha256_of_summary

KEYS = TypeAdapter(dict[str, bool | Annotated[int, Field(ge=-LARGEST, le=LARGEST)] | Finite | str | dict[str, Any]])
REQUIRED_KEYS = ("mode", "seed", "optimizer", "batch-size")
NOT_NUMBERS = {"metric", "tests"}  # fields that hold others
SHOWN_LINES = 5  # line numbers in one warning

T = TypeVar("T")


class Summary(Costs):
    """summary.json. Accuracies, or in `tests` those of another metric, are None if nothing was tested.

    What else was tested is in `tests` too.
    """

    finished: bool
    best_test_accuracy: Accuracy | None = None
    final_test_accuracy: Accuracy | None = None
    metric: MetricRecord | None = None
    tests: dict[str, Tested] = Field(default_factory=dict)
    parameters: Natural | None = None
    date: str | None = None  # of its end, in ISO 8601
    host: str | None = None
    device: str | None = None
    commit: str | None = None
    command: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    sha256: dict[str, str] = Field(default_factory=dict)  # of the files that it was written with, by name

    @model_validator(mode="before")
    @classmethod
    def _current(cls, record: Any) -> Any:
        """A summary of any version with the names of now, and what was tested in `tests`."""
        if not isinstance(record, dict):
            return record
        metric = metric_of(record)
        if missing := [name for name in (metric.best, metric.final) if name not in record]:
            raise ValueError(f"{missing[0]} is missing")
        names = [metric.best, *(name for name in record if name.startswith("final_test_"))]
        tests = {name: record[name] for name in names if name not in cls.model_fields}
        return {**current_columns(record), "tests": tests}


class Records(NamedTuple):
    """All runs under a folder.

    `runs`: a line for each run: the keys of its configuration in kebab-case, those of its summary in snake_case,
    `folder`, `run` (its name), `metric` (what it is compared by) and `identity` (equal for all seeds of a cell).
    Unfinished runs have their costs and metrics so far.
    `rows`: a line for each row of each run, with `run`, the index of its run.
    """

    runs: pd.DataFrame
    rows: pd.DataFrame
    warnings: list[str]


def read_records(root: Path) -> Records:
    """Read every run at any depth under `root`."""
    warnings: list[str] = []
    runs: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for path in sorted(root.rglob(CONFIG)):
        config = _read(path, parse_config, warnings)
        if config is None:
            continue
        summary = _read(path.with_name(SUMMARY), parse_summary, warnings)
        content = _read(path.with_name(ROWS), bytes, warnings)
        digest = summary.sha256.get(ROWS) if summary and summary.finished else None
        if digest and content is not None and sha256(content).hexdigest() != digest:
            where = escaped(path.with_name(ROWS))
            warnings.append(f"{where}: its SHA-256 is not the one in summary.json; the run is left out")
            continue
        own = _parse_rows(path.with_name(ROWS), content or b"", warnings)
        for row in own:
            tests = {name: value for name, value in row.tests.items() if not isinstance(value, list)}
            rows.append({"run": len(runs), **row.model_dump(exclude=NOT_NUMBERS), **tests})
        identity = json.dumps(cell_identity(config), sort_keys=True)
        keys = {name: value for name, value in config.items() if name not in MACHINE}
        run = {"folder": path.parent, "run": escaped(path.parent.name), "identity": identity}
        runs.append({**keys, **_outcome(summary, own), **run})
    columns = list(dict.fromkeys(["run", *Columns.model_fields, *(name for row in rows for name in row)]))
    columns = [name for name in columns if name not in NOT_NUMBERS]
    types = {**dict.fromkeys(columns, float), "run": int, "round": int}
    return Records(pd.DataFrame(runs, dtype=object), pd.DataFrame(rows, columns=columns).astype(types), warnings)


def with_types(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` with a numeric type for columns of numbers, and NaN for missing values."""
    return pd.DataFrame({name: _typed(column) for name, column in frame.items()}, index=frame.index)


def _typed(column: pd.Series) -> pd.Series:
    """A column of Python objects, as numbers where all that are not missing are numbers (and not truth values)."""
    filled = column.where(column.notna(), float("nan"))
    kinds = set(map(type, column.dropna()))
    return pd.to_numeric(filled) if kinds <= {int, float} else filled.infer_objects()


def parse_config(content: bytes) -> dict[str, Value]:
    """A run's mode and keys; keys that are newer than the run have their defaults."""
    held: dict[str, Any] = KEYS.validate_json(content, strict=True)
    missing = [name for name in REQUIRED_KEYS if name not in held]
    if missing:
        raise UserError(f"{missing[0]} is missing")
    if held["mode"] not in ("centralized", "localsgd"):
        raise UserError(f"mode = {held['mode']!r} is not centralized or localsgd")
    mode: Mode = held["mode"]
    check_version(held)
    known = Config().identity(mode)
    checked = Config().changed({name: value for name, value in held.items() if name in known})
    return complete_record({**held, **checked.identity(mode)})


def parse_summary(content: bytes) -> Summary:
    """A run's summary; raises UserError where its SHA-256 is not the one in it. Older summaries have none."""
    summary = Summary.model_validate_json(content)
    if summary.sha256 and summary.sha256.get(SUMMARY) != sha256_of_summary(json.loads(content)):
        raise UserError("its SHA-256 is not the one in it")
    return summary


def cell_identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's configuration, with its mode, that all runs of its cell share: not the seed and machine."""
    shared = {name: value for name, value in config.items() if name not in ("seed", *MACHINE)}
    of_built_in = {key: given for key, given in config.get(ARGUMENTS, {}).items() if not names_own(config[key])}
    return {**shared, ARGUMENTS: of_built_in}  # to know those of the user's own, it would have to be imported


def escaped(text: object) -> str:
    """`text`, such as a path or an error, with control characters, and bytes that are not UTF-8, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _outcome(summary: Summary | None, rows: list[Columns]) -> dict[str, Any]:
    """The metric, its values, costs and origin of a run: from its summary if it is finished, else from its rows."""
    recorded = (rows[-1].metric if rows else None) or (summary and summary.metric)
    metric = recorded.metric if recorded else ACCURACY
    tested = [value for row in rows if (value := row.value(metric)) is not None]
    so_far: dict[str, Any] = {f"final_{name}": value for row in rows for name, value in row.tests.items()}
    so_far |= {metric.best: metric.best_of(tested), metric.final: tested[-1] if tested else None}
    last = rows[-1].model_dump(include=set(Costs.model_fields)) if rows else {}
    summarized: dict[str, Any] = {"finished": False}
    if summary:
        summarized = {**summary.model_dump(exclude_none=True, exclude=NOT_NUMBERS), **summary.tests}
    if summarized["finished"]:
        so_far = dict.fromkeys(so_far)
    else:
        summarized = {name: value for name, value in summarized.items() if name not in {*Columns.model_fields, *so_far}}
    traffic = {name: last[name] for name in TRAFFIC if last.get(name) is not None}  # an older summary's is another
    known = dict.fromkeys(name for name in Summary.model_fields if name not in NOT_NUMBERS)
    return {**known, **last, **so_far, **summarized, **traffic, "metric": metric}


def _read(path: Path, parse: Callable[[bytes], T], warnings: list[str]) -> T | None:
    """The parsed file; None if it does not exist, and None with a warning if it is damaged."""
    try:
        if not path.exists():
            return None
        if not path.is_file():
            raise UserError("not a file")
        return parse(path.read_bytes())
    except (OSError, ValueError) as error:
        left_out = "the run is left out" if path.name == CONFIG else "it is ignored"
        warnings.append(f"{escaped(path)}: {_reason(error)}; {left_out}")
        return None


def _parse_rows(path: Path, content: bytes, warnings: list[str]) -> list[Columns]:
    """The rows sorted by round; the last one of a repeated round."""
    rows: dict[int, Columns] = {}
    damaged: list[str] = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = Columns.model_validate_json(line)
            rows[row.round] = row
        except ValidationError:
            damaged.append(str(number))
    if damaged:
        some = ", ".join(damaged[:SHOWN_LINES]) + (", ..." if len(damaged) > SHOWN_LINES else "")
        warnings.append(f"{escaped(path)}: {len(damaged)} damaged rows are skipped, line {some}")
    return [rows[number] for number in sorted(rows)]


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        where = "".join(f"{part} " for part in first["loc"][:1])
        return escaped(f"damaged ({where}{first['msg']})")
    return escaped(f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error))
