"""What a run's folder records: its rows and its summary, read and verified."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from fedsim.data.metric import metric_of
from fedsim.errors import UserError
from fedsim.runs.columns import SENT, Costs, current_columns, current_row, lists_in, names_with, tests_in
from fedsim.runs.folder import MODEL, ROWS, SUMMARY, parsed, read_json, write_json
from fedsim.system.files import open_file, read_file

Row = dict[str, Any]
ROW_VERSION = 2  # 1: without a version, and bytes_* held the overhead_bytes_* too
TRAFFIC = names_with(SENT)
COSTS = tuple(name for name in Costs.model_fields if name != "seconds")


def verified_rows(folder: Path) -> list[Row]:
    """The rows of a run; raises UserError if it is finished and its summary was written with others.

    Summaries of older versions have no digests: only their numbers are compared with the rows.
    """
    rows, summary = read_rows(folder), read_summary(folder)
    if summary and summary["finished"]:
        _verify_sha256(folder, ROWS, summary)
        if any(summary.get(name, value) != value for name, value in outcome_of(rows).items()):
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
    lines = rows_content(folder).splitlines()
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(current_row(parsed(line)))
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(
                f"{folder / ROWS} line {number} is damaged: restore it, or give --rerun to run it again"
            ) from error
    return rows


def each_row(folder: Path) -> Iterator[Row]:
    """The rows of a run of this process, one by one, since there may be a million."""
    with open_file(folder / ROWS) as file:
        for line in file:
            yield current_row(parsed(line))


def rows_content(folder: Path) -> bytes:
    """The content of metrics.jsonl."""
    path = folder / ROWS
    try:
        return read_file(path) if path.exists() else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): restore it, or give another --name") from error


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a run that has finished or stopped early, or None."""
    path = folder / SUMMARY
    if not path.exists():
        return None
    remedy = "restore it, or remove it: the same command then writes it again"
    summary = read_json(path, remedy)
    valid = isinstance(summary.get("finished"), bool) and isinstance(digests := summary.get("sha256", {}), dict)
    if valid and summary["finished"]:
        metric = metric_of(summary)
        valid = all(map(_is_number, map(summary.get, (metric.best, metric.final, "seconds"))))
    if valid and digests:  # summaries of older versions have none
        valid = digests.get(SUMMARY) == sha256_of_summary(summary)
    if not valid:
        raise UserError(f"{path} is damaged: {remedy}")
    summary = current_columns(summary)
    if "overhead_bytes_up" not in summary:  # its bytes may hold the overhead: those of the last row do not
        last = read_rows(folder)[-1:]
        summary |= {name: row[name] for row in last for name in TRAFFIC if name in row}
    return summary


def outcome_of(rows: Iterable[Row]) -> dict[str, Any]:
    """The metric, costs and seconds that a summary records of all rows of a run."""
    best, final, last, last_test = None, None, Row(), Row()
    for last in rows:
        if _is_number(tested := last.get(metric_of(last).column)):
            best, final = metric_of(last).best_of([tested] if best is None else [best, tested]), tested
            last_test = last
    metric = metric_of(last)
    others = [name for name in (*tests_in(last_test), *lists_in(last_test)) if name not in ("test_loss", metric.column)]
    return {
        metric.best: best,
        metric.final: final,
        **{f"final_{name}": last_test[name] for name in others},
        **metric.record(),
        **{name: last.get(name, 0) for name in COSTS},
        "seconds": last.get("seconds", 0.0),
    }


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_summary(summary: Mapping[str, Any]) -> str:
    """The SHA-256 of a summary without its digests, among which it is."""
    content = {name: value for name, value in summary.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _differs(path: Path, sha256: str) -> bool:
    """Whether the file exists and has another digest, or cannot be read."""
    try:
        return path.exists() and sha256_of(path) != sha256
    except OSError:
        return True


def write_summary(folder: Path, summary: Mapping[str, Any], sha256: Mapping[str, str]) -> None:
    """Write a summary with the digests of the files that it is of, if there are any, and of itself."""
    sealed = {"sha256": {**sha256, SUMMARY: sha256_of_summary(summary)}} if sha256 else {}
    write_json(folder / SUMMARY, {**summary, **sealed})
