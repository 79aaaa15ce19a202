"""Rewrite folders of results of earlier versions, whose keys are now written otherwise. No number is changed."""

from __future__ import annotations

import csv
import io
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from fedsim.config import ARGUMENTS, BUDGET, Config, has_budget
from fedsim.errors import UserError
from fedsim.experiments.study import STORED, TRIALS, read_study
from fedsim.runs.folder import CONFIG, MACHINE
from fedsim.spellings import present
from fedsim.system.files import atomic_write


def migrate(root: Path) -> list[str]:
    """Rewrite every run's configuration and every stored study below `root`; returns a line for each that changed."""
    if not root.is_dir():
        raise UserError(f"{root} is no folder: give a folder of results")
    changed = []
    for name, rewritten in ((CONFIG, _config), (STORED, _study), (TRIALS, _trials)):
        for path in sorted(root.rglob(name)):
            try:
                before = path.read_text(encoding="utf-8")
                after = rewritten(before)
            except (ValueError, KeyError, UserError) as error:
                raise UserError(f"{path} cannot be migrated: {' '.join(str(error).split())}") from error
            if after != before:
                with atomic_write(path) as file:
                    file.write(after.encode())
                changed.append(str(path))
    for path in sorted(root.rglob(STORED)):
        changed += _renamed(path)
    return changed


def _config(text: str) -> str:
    held = json.loads(text)
    if ARGUMENTS in held:
        return text
    mode = held.pop("mode")
    budget = held.pop(BUDGET, "to a round")
    record = Config().changed(present(held)).record(mode)
    if has_budget(record):
        record[BUDGET] = budget
    return json.dumps(record, indent=2) + "\n"


def _study(text: str) -> str:
    held = tomllib.loads(text)
    grid, settings = dict(held.get("grid", {})), dict(held.get("set", {}))
    for rule, batch in (("lr-scaling", "lr-scaling-batch"), ("scaling", "reference-batch")):
        if rule in grid and batch in settings:
            grid[batch] = settings.pop(batch)
    held |= {name: present(entry) for name, entry in (("grid", grid), ("set", settings)) if name in held}
    for case in held.get("case", []):
        case.update(when=present(case["when"]), set=present(case["set"]))
    if "tune" in held:
        held["tune"]["grid"] = present(held["tune"]["grid"])
    if "chosen" in held:
        held["chosen"] = {cell: present(keys) for cell, keys in held["chosen"].items()}
    return text if held == tomllib.loads(text) else tomli_w.dumps(held)


def _trials(text: str) -> str:
    rows = [present(row) for row in csv.DictReader(io.StringIO(text))]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue() if rows else text


def _renamed(stored: Path) -> Iterator[str]:
    """Give each run's folder the name that its cell has now."""
    study = read_study(str(stored))
    name_of = {_identity(cell.config.record(cell.mode, own=False)): cell.config.name for cell in study.cells()}
    for path in sorted(stored.parent.glob(f"*/{CONFIG}")):
        folder = path.parent
        name = name_of.get(_identity(json.loads(path.read_text())), folder.name)
        if name != folder.name and not (target := folder.with_name(name)).exists():
            folder.rename(target)
            yield f"{folder} is {name} now"


def _identity(record: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in record.items() if name not in (*MACHINE, BUDGET)}
    return json.dumps(kept, sort_keys=True)
