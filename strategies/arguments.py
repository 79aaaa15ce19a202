"""Choices by name, with their arguments: ``name:key=value,key=value``, and chains of them, ``one:key=value+other``.

What a name stands for is a class or a function, and its arguments are the parameters with which it is called. Their
types say how a text is read. ``-`` and ``_`` are equal in names, and ``/`` separates the parts of a tuple. The
canonical text of a choice is its name and the arguments that differ from their defaults, in their order.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import math
import re
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

CHAIN = re.compile(r"\+(?=[^\W\d])")  # between the parts of a chain; not in 1e+3
REQUIRED = inspect.Parameter.empty  # the default of an argument that has none
OF_THE_RUN = "given by the run"  # in the metadata of the type of a parameter that is no argument of the text
PLURALS = {int: "whole numbers", float: "numbers", str: "words"}
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


class Bound(NamedTuple):
    """A limit of an argument, in the metadata of its type: ``ratio: Annotated[float, above(0), at_most(1)]``."""

    words: str
    allows: Callable[[float], bool]


def above(least: float) -> Bound:
    """More than this."""
    return Bound(f"greater than {least:g}", lambda value: value > least)


def at_least(least: float) -> Bound:
    """This, or more."""
    return Bound(f"at least {least:,g}", lambda value: value >= least)


def below(most: float) -> Bound:
    """Less than this."""
    return Bound(f"less than {most:g}", lambda value: value < most)


def at_most(most: float) -> Bound:
    """This, or less."""
    return Bound(f"at most {most:,.15g}", lambda value: value <= most)


class Argument(NamedTuple):
    """A parameter of a choice; `kind` is None where only its value tells its type."""

    name: str
    kind: Any
    default: Any
    bounds: tuple[Bound, ...] = ()

    @property
    def accepts(self) -> str:
        """What it accepts, in words."""
        parts = get_args(self.kind)
        if get_origin(self.kind) is Literal:
            return f"one of {', '.join(parts)}"
        limits = " and ".join(bound.words for bound in self.bounds)
        if parts:
            how_many = "one or several" if parts[-1] is ... else str(len(parts))
            return f"{how_many} {PLURALS.get(parts[0], 'numbers')} with a / between" + (
                f", each {limits}" if limits else ""
            )
        return f"{WORDS.get(self.kind, 'a number or a word')} {limits}".strip()

    def read(self, text: str) -> Any:
        """The value that `text` says; raises ValueError."""
        return self.checked(_read(text, self.kind, self.default))

    def checked(self, value: Any) -> Any:
        """`value`, which may be of Python or TOML, in the type of the argument; raises ValueError."""
        if value is None and self.default is None:
            return value
        try:
            value = _typed(value, self.kind)
            parts = value if isinstance(value, tuple) else (value,)
            valid = all(bound.allows(part) for part in parts for bound in self.bounds if part is not None)
        except (TypeError, ValueError, OverflowError):
            valid = False
        if not valid:
            raise ValueError(f"{kebab(self.name)} = {written(value)} must be {self.accepts}")
        return value


@dataclass(frozen=True)
class Choice:
    """A class or function with its `arguments`; those `given` differ from their defaults."""

    name: str
    kind: Callable[..., Any]
    given: Mapping[str, Any]  # in the order of the parameters
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        pairs = ",".join(f"{kebab(name)}={written(value)}" for name, value in self.given.items())
        return f"{self.name}:{pairs}" if pairs else self.name

    def make(self, *leading: Any, **implied: Any) -> Any:
        """What the choice stands for, called with its arguments, and those of `implied` that it takes."""
        taken = _parameters(self.kind)
        return self.kind(*leading, **{name: value for name, value in implied.items() if name in taken}, **self.given)


def read_choice(
    text: str, kind_of: Callable[[str], Callable[..., Any]], implied: tuple[str, ...] = (), leading: int = 0
) -> Choice:
    """The choice that `text` names; `kind_of` gives the class or function of a name, and raises what it wants.

    The first `leading` parameters, and those that are `implied`, are no arguments. Raises ValueError with one line on
    what is wrong.
    """
    name, pairs = split_name(text)
    kind = kind_of(name)
    known = arguments_of(kind, implied, leading)
    given: dict[str, Any] = {}
    for pair in filter(None, map(str.strip, pairs.split(","))):
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        argument = known.get(key.replace("-", "_"))
        if argument is None and _takes_any(kind):
            argument = Argument(key.replace("-", "_"), None, None)
        elif argument is None:
            names = list(map(kebab, known))
            takes = f"it must be one of {', '.join(names)}" if names else "it takes none"
            raise ValueError(f"{name} has no argument {key}{nearest(key, names)}: {takes}")
        if not equals:
            raise ValueError(f"{name}: {key} has no value: give {key}=...")
        if argument.name in given:
            raise ValueError(f"{name}: {key} is given twice: leave one of them out")
        try:
            given[argument.name] = argument.read(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    missing = [argument for argument in known.values() if argument.default is REQUIRED and argument.name not in given]
    if missing:
        first = missing[0]
        raise ValueError(f"{name} needs {kebab(first.name)}: give {name}:{kebab(first.name)}=..., {first.accepts}")
    every = {**{key: argument.default for key, argument in known.items()}, **given}
    changed = {key: value for key, value in every.items() if key not in known or value != known[key].default}
    return Choice(name, kind, changed, every)


def check_fields(method: Any) -> None:
    """Raise ValueError where a field of a frozen dataclass has another type than it declares, or is out of bounds."""
    kind: Any = type(method)
    for argument in arguments_of(kind).values():
        try:
            argument.checked(getattr(method, argument.name))
        except ValueError as error:
            raise ValueError(f"{type(method).__name__}: {error}") from None


def split_name(text: str) -> tuple[str, str]:
    """The name in `text`, which may be ``package.module:Class``, and its arguments."""
    name, _, rest = text.partition(":")
    second, _, more = rest.partition(":")
    if second and "=" not in second:
        return f"{name}:{second}", more
    return name if "." in name else name.replace("_", "-"), rest


def spelled(pairs: str) -> str:
    """The text of arguments in the usual spelling, where their types are not known."""
    parted = [[piece.strip() for piece in pair.partition("=")] for pair in pairs.split(",")]
    return ",".join(
        f"{kebab(key)}={written(_read(value, None, None))}" if equals else key for key, equals, value in parted
    )


@functools.lru_cache(maxsize=512)  # of every choice in each configuration
def arguments_of(kind: Any, implied: tuple[str, ...] = (), leading: int = 0) -> dict[str, Argument]:
    """The arguments of a class or function, in their order: its parameters without those that the run gives."""
    annotated = getattr(kind, "__init__", kind) if isinstance(kind, type) and not is_dataclass(kind) else kind
    hints: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # other people's annotations may name what cannot be found
        hints = get_type_hints(annotated, include_extras=True)
    found = {}
    for parameter in list(_parameters(kind).values())[0 if is_dataclass(kind) else leading :]:
        name, default, hint = parameter.name, parameter.default, hints.get(parameter.name, parameter.annotation)
        metadata = _metadata(hint)
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and name not in implied and OF_THE_RUN not in metadata:
            bounds = tuple(each for each in metadata if isinstance(each, Bound))
            found[name] = Argument(name, _kind(hint, default), default, bounds)
    return found


def _metadata(hint: Any) -> tuple[Any, ...]:
    """That of an annotation, and of the types that it joins."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(each for part in get_args(hint) for each in _metadata(part))
    return getattr(hint, "__metadata__", ())


def _takes_any(kind: Callable[..., Any]) -> bool:
    return any(each.kind is each.VAR_KEYWORD for each in _parameters(kind).values())


def _parameters(kind: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(kind).parameters
    except ValueError:  # of a function in C
        return {}


def _kind(hint: Any, default: Any) -> Any:
    """The type of an argument, by its annotation, or by its default where that says nothing."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (Union, types.UnionType):
        known = [kind for kind in (_kind(each, REQUIRED) for each in get_args(hint)) if kind is not None]
        return next((kind for kind in known if get_origin(kind) is tuple), known[0] if known else _kind(None, default))
    if get_origin(hint) in (tuple, list):
        parts = [part if part is ... else _kind(part, REQUIRED) for part in get_args(hint)]
        return tuple[(*parts, ...) if get_origin(hint) is list else (*parts,)]  # type: ignore[misc]
    if hint in WORDS or get_origin(hint) is Literal:
        return hint
    if isinstance(default, tuple):
        return tuple[tuple(_kind(None, part) for part in default)]  # type: ignore[misc]
    return type(default) if type(default) in WORDS else None


def _read(text: str, kind: Any, default: Any) -> Any:
    if get_origin(kind) is tuple:
        parts, texts = get_args(kind), text.split("/")
        kinds = [parts[0]] * len(texts) if parts[-1] is ... else [*parts, *[None] * (len(texts) - len(parts))]
        return tuple(_read(each, one, None) for each, one in zip(texts, kinds, strict=False))
    if text == "none" and default is None and kind is not str:
        return None
    if kind is None:
        parts = tuple(map(_guessed, text.split("/")))
        return parts if len(parts) > 1 else parts[0]
    guessed = _guessed(text)
    return text if kind is str or get_origin(kind) is Literal else guessed


def _guessed(text: str) -> bool | int | float | str:
    """A number or truth value, where the text looks like one."""
    if re.fullmatch(r"[+-]?[0-9]{1,4000}", text):
        return int(text)
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", text, re.IGNORECASE):
        return float(text)
    return {"true": True, "false": False}.get(text.lower(), text)


def _typed(value: Any, kind: Any) -> Any:
    """`value` in the type `kind`; raises TypeError or ValueError where it is of another."""
    if get_origin(kind) is tuple:
        parts, values = get_args(kind), tuple(value) if isinstance(value, list | tuple) else (value,)
        kinds = [parts[0]] * len(values) if parts[-1] is ... else parts
        return tuple(None if each is None else _typed(each, one) for each, one in zip(values, kinds, strict=True))
    if isinstance(value, float | int) and not math.isfinite(value):
        raise ValueError
    if kind is float and type(value) is int:
        return float(value)
    if value not in get_args(kind) if get_origin(kind) is Literal else kind not in (None, type(value)):
        raise TypeError
    return value


def written(value: Any) -> str:
    """The text of an argument's value."""
    if isinstance(value, bool | None):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "/".join(map(written, value))
    if isinstance(value, float) and (short := f"{value:.15g}") and float(short) == value:
        return short
    return str(value)


def kebab(name: str) -> str:
    """The key, or the argument in a text, of a field's name."""
    return name.replace("_", "-")


def nearest(name: str, names: Collection[str], cutoff: float = 0.6) -> str:
    """A hint at the one of `names` that is most like `name`; empty if the similarity of none is `cutoff`."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f" (did you mean {near[0]}?)" if near else ""
