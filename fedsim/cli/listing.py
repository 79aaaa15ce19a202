"""``fedsim list``: what a key may choose, each with its arguments, by their declarations and docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from fedsim.config import CHOSEN, seam_of
from fedsim.config.messages import error_at
from fedsim.errors import UserError
from fedsim.registry import FUNCTION, Seam
from strategies.arguments import REQUIRED, Argument, arguments_of, kebab, nearest, split_name, written


def listed(key: str, name: str = "") -> Iterator[str]:
    """The lines for a key, or for one `name` of it; without a key, a line for each.

    Raises UserError for a key that chooses nothing, and for a name that is unknown.
    """
    keys = [kebab(name) for name in CHOSEN]
    if not key:
        yield from (f"{each}: {', '.join(seam_of(each).names)}" for each in keys)
        return
    if key not in keys:
        raise UserError(f"{key} has no choices{nearest(key, keys)}: give one of {', '.join(keys)}")
    seam = seam_of(key)
    if name:
        try:
            for part in seam.parts(name):
                own, given = split_name(part)
                yield from _choice(seam, own, seam.read(part)[0].given if given else {})
        except ValueError as error:
            raise UserError(error_at(key, name, str(error))) from error
        return
    for name in seam.names:
        yield from _choice(seam, name)
    if seam.others:
        extends = f"; the class extends {seam.own.replace(' ', ' or ')}" if seam.own not in ("", FUNCTION) else ""
        yield f"or {seam.others}{extends}"


def _choice(seam: Seam, name: str, given: Mapping[str, Any] = {}) -> Iterator[str]:
    """The lines of a name: what it is, and its arguments; after those that are `given` also their values."""
    if name == "none":
        yield name
        return
    kind = seam.kind(name)
    sentence = (inspect.getdoc(kind) or "").split("\n\n")[0]
    yield f"{name}: {' '.join(sentence.split())}" if sentence else name
    for argument in arguments_of(kind, seam.implied, seam.leading).values():
        value = f": here {written(given[argument.name])}" if argument.name in given else ""
        yield f"    {_argument(argument)}{value}"


def _argument(argument: Argument) -> str:
    default = "must be given" if argument.default is REQUIRED else f"default: {written(argument.default)}"
    return f"{kebab(argument.name)}: {argument.accepts} ({default})"
