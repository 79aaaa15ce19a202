"""Methods by name, with their arguments: ``name:key=value,key=value``, and chains of them, ``one:key=value+other``.

The fields of a method's dataclass are its arguments; their types say how the text is read. In keys and names ``-`` and
``_`` are equal, and ``/`` separates the numbers of a tuple.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any, get_type_hints


def by_name(kinds: Mapping[str, type], text: str, **given: Any) -> Any:
    """The method `text`, one of `kinds` with its arguments; those in `given` are used where the text has none.

    Raises ValueError with one line on what is wrong.
    """
    name, _, rest = text.partition(":")
    kind = kinds.get(name.replace("_", "-"))
    if kind is None:
        raise ValueError(f"{name} is unknown{_nearest(name, kinds)}: it must be one of {', '.join(kinds)}")
    types = _types(kind)
    arguments = {field: value for field, value in given.items() if field in types}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        field = key.strip().replace("-", "_")
        if field not in types:
            known = f"it must be one of {', '.join(types)}" if types else "it takes none"
            raise ValueError(f"{name} has no argument {key}{_nearest(key, types)}: {known}")
        if not equals:
            raise ValueError(f"{name}: {key} has no value: give {key}=...")
        arguments[field] = _read(f"{name}: {key}", value.strip(), types[field])
    return kind(**arguments)


def _types(kind: type) -> dict[str, Any]:
    """The arguments of a method and their types, in their order."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _read(what: str, text: str, kind: Any) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"{what} = {text} must be true or false")
        return text == "true"
    several = getattr(kind, "__args__", ())
    if several:
        return tuple(_read(what, each, several[0]) for each in text.split("/"))
    try:
        return kind(text)
    except ValueError:
        noun = {int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"{what} = {text} must be {noun}") from None


def _nearest(name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
