"""What a shell completes: names of choices, of studies and of their cells, and paths."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem
from pydantic.fields import FieldInfo

from fedsim.config.messages import suggestions
from fedsim.config.types import is_path
from fedsim.errors import UserError

STUDIES = Path(__file__).parents[1] / "studies"
Completion = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def completion_of(name: str, field: FieldInfo) -> Completion:
    """The completion of a flag or argument: its names that start with the text typed so far, or else a path."""

    def complete(context: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:
        done, comma, last = typed.rpartition(",") if name == "cells" else ("", "", typed)
        found = [f"{done}{comma}{each}" for each in _names(name, field, context) if each.startswith(last)]
        paths = name == "studies" or is_path(field)
        return [*map(CompletionItem, found), *([CompletionItem(typed, type="file")] if paths else [])]

    return complete


def _names(name: str, field: FieldInfo, context: click.Context) -> Iterable[str]:
    if name == "cells":
        return _cells([*(context.params["studies"] or ()), *context.args])  # click leaves words before an open flag
    if name in ("studies", "preset"):
        return sorted(path.stem for path in STUDIES.glob("*.toml"))
    return suggestions(field)


def _cells(studies: Iterable[str]) -> list[str]:
    """The names of the cells of these studies."""
    from fedsim.experiments.study import read_study  # slow to import

    found: list[str] = []
    for study in studies:
        with contextlib.suppress(UserError):  # it cannot be read
            found += (cell.name for cell in read_study(study).cells())
    return list(dict.fromkeys(found))
