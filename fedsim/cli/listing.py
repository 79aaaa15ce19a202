"""``fedsim list``: what a key may choose, each with its arguments, by their declarations and docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from fedsim.config import CHOSEN, seam_of
from fedsim.config.messages import error_at
from fedsim.errors import UserError
from fedsim.registry import FUNCTION, Seam
from strategies.arguments import REQUIRED, Argument, arguments_of, kebab, nearest, written


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
            yield from _choice(seam, name)
        except ValueError as error:
            raise UserError(error_at(key, name, str(error))) from error
        return
    for name in seam.names:
        yield from _choice(seam, name)
    if seam.others:
        extends = f"; the class extends {seam.own.replace(' ', ' or ')}" if seam.own not in ("", FUNCTION) else ""
        yield f"or {seam.others}{extends}"


def _choice(seam: Seam, name: str) -> Iterator[str]:
    if name == "none":
        yield name
        return
    kind = seam.kind(name)
    sentence = (inspect.getdoc(kind) or "").split("\n\n")[0]
    yield f"{name}: {' '.join(sentence.split())}" if sentence else name
    for argument in arguments_of(kind, seam.implied, seam.leading).values():
        yield f"    {_argument(argument)}"


def _argument(argument: Argument) -> str:
    default = "must be given" if argument.default is REQUIRED else f"default: {written(argument.default)}"
    return f"{kebab(argument.name)}: {argument.accepts} ({default})"
