"""What a key accepts, in words, and the one-line errors of what it does not."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from fedsim.config.types import From
from fedsim.errors import UserError
from fedsim.spellings import now
from strategies.arguments import kebab

SHOWN = 60  # characters of a refused value
Fields = Mapping[str, FieldInfo]


def suggestions(field: FieldInfo) -> tuple[str, ...]:
    """The names that a key accepts, also where it accepts other values too."""
    return next((each.seam.names for each in field.metadata if isinstance(each, From)), choices(field))


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The values that a key accepts where it has a few names; else none."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def accepted(field: FieldInfo, limits: bool = True) -> str:
    """What a key accepts, in words; empty where its description has to say it.

    Without `limits`, those bounds are left out that no sensible value comes near.
    """
    if names := choices(field):
        return f"one of {', '.join(names)}"
    for each in field.metadata:
        if isinstance(each, From):
            others = f", or {each.seam.others}" if each.seam.others else ""
            return f"one of {', '.join(each.seam.names)}{others}"
    return " and ".join(_bounds(field, limits))


def about(field: FieldInfo) -> str:
    """What a key means and accepts, for help."""
    return "; ".join(filter(None, [(field.description or "").rstrip("."), accepted(field, limits=False)]))


def _bounds(field: FieldInfo, limits: bool) -> Iterator[str]:
    for bound in field.metadata:
        match bound:
            case annotated_types.Gt(gt):
                yield f"greater than {gt}"
            case annotated_types.Ge(ge):
                yield f"at least {ge}"
            case annotated_types.Lt(lt):
                yield f"less than {lt}"
            case annotated_types.Le(int(le)) if limits or le < 10**6:
                yield f"at most {le:,}"


def user_error(failure: ValidationError, fields: Fields, name: str = "") -> UserError:
    """The first error of a validation in one line that names the key and the remedy."""
    error = failure.errors(include_url=False)[0]
    reason = str(error.get("ctx", {}).get("error", ""))
    if not name and not error["loc"]:
        return UserError(reason)
    name = name or str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return unknown(name, fields)
    if reason and any(isinstance(each, From) for each in _metadata(fields, name)):
        return UserError(error_at(name, str(error["input"]), reason))
    value = shown(error["input"])
    if reason:
        return UserError(f"{name} = {value} {reason}")
    field = fields[name.replace("-", "_")]
    if error["type"] in KINDS:
        return UserError(f"{name} = {value} is not {KINDS[error['type']]}")
    if names := choices(field):
        near = difflib.get_close_matches(value, names, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return UserError(f"{name} = {value} is unknown: it must be {accepted(field)}{hint}")
    value = value.strip("'")  # a flag's text, which is a number
    finite = "finite and " if error["type"] == "finite_number" else ""
    return UserError(f"{name} = {value} is out of range: it must be {finite}{accepted(field)}")


def error_at(key: str, text: str, reason: str) -> str:
    """The line for a choice that cannot be made; the reason begins with the part of the text that is wrong."""
    printable = shown(text)[1:-1]
    text, reason = printable, reason.replace(text, printable)
    return f"{key} = {reason}" if reason.startswith(f"{text} ") else f"{key} = {text}: {reason}"


KINDS = {  # pydantic's error types
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
}


def unknown(name: str, fields: Fields) -> UserError:
    """The error of a key that there is not."""
    if written_now := now(kebab(name)):
        return UserError(
            f"{shown(name)[1:-1]} is written {written_now} now; fedsim migrate rewrites folders of results"
        )
    near = difflib.get_close_matches(kebab(name), map(kebab, fields), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "see --help for the keys"
    return UserError(f"unknown key {shown(name)[1:-1]}: {hint}")


def shown(value: object) -> str:
    """A value on one line, shortened."""
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except ValueError:  # an integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _metadata(fields: Fields, key: str) -> list[Any]:
    field = fields.get(key.replace("-", "_"))
    return field.metadata if field else []
