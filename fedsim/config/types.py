"""The types of keys: how a flag's text, a TOML value or a Python object becomes a value, and what is refused."""

from __future__ import annotations

import dataclasses
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BeforeValidator, Field, GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from fedsim.registry import Seam
from strategies.arguments import Choice

MAX_LOCAL_STEPS = 10**6
MAX_THREADS = 1024  # of one training step; more than a process can start crash it
MAX_NAME_BYTES = 255  # of a file system


def _number_or_bool(value: Any) -> Any:
    """A flag's text as a number or a truth value; everything else unchanged, for pydantic to judge."""
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"[+-]?[0-9]{1,4000}", value):
        return int(value)
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", value, re.IGNORECASE):
        return float(value)
    return {"true": True, "false": False}.get(value.lower(), value)


def _number(value: Any) -> Any:
    """The same, with integers that no float can hold as infinity."""
    value = _number_or_bool(value)
    if type(value) is int:
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return value


def _printable(value: str) -> str:
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in value):
        raise ValueError("holds a control character, a line break or a byte that is not UTF-8: leave it out")
    return value


def _path(value: str) -> str:
    if value.startswith("~") and value[1:2] not in ("", "/"):
        raise ValueError("begins with another user's home folder: give the whole path")
    if any(len(part.encode()) > MAX_NAME_BYTES for part in value.split("/")):
        raise ValueError(f"has a name of more than {MAX_NAME_BYTES} bytes: give shorter ones")
    return value


def is_path(field: FieldInfo) -> bool:
    """Whether the value of a field is a path, or several."""
    (item, *_) = get_args(field.annotation) or (None,)
    marks = (*field.metadata, *getattr(item, "__metadata__", ()))
    return any(isinstance(each, AfterValidator) and each.func is _path for each in marks)


def not_empty(value: str) -> str:
    """A folder's name; raises ValueError for none."""
    if not value:
        raise ValueError("is empty: give a folder")
    return value


def _folder_name(value: str) -> str:
    if "/" in value or value in (".", ".."):
        raise ValueError("is not a plain folder name: leave out slashes")
    return value


def check_device(value: str) -> str:
    """A device's name; raises ValueError for any other text."""
    if not re.fullmatch("auto|cpu|cuda(:[0-9]{1,3})?", value):
        raise ValueError("is out of range: it must be auto, cpu, cuda or cuda:N")
    return value


@dataclasses.dataclass(frozen=True)
class From:
    """In the metadata of a key: what it chooses from. Its value is the canonical text of the choice.

    In Python it may also be given as the object itself, or as a dict of its ``name`` and arguments; a chain as a list
    of these.
    """

    seam: Seam

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        checked = core_schema.no_info_after_validator_function(self.canonical, handler(source))
        return core_schema.no_info_before_validator_function(self.text_of, checked)

    def canonical(self, text: str) -> str:
        """The canonical text."""
        return self.seam.canonical(text)

    def text_of(self, value: Any) -> Any:
        if self.seam.chain and isinstance(value, list | tuple):
            parts = [self.text_of(part) for part in value]
            return "+".join(parts) if parts and all(isinstance(part, str) for part in parts) else value
        if isinstance(value, Mapping):
            if "name" not in value:
                raise ValueError("has no name: give a dict with it and the arguments, for instance {'name': 'none'}")
            given = dict(value)
            return _text(str(given.pop("name")), given)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            arguments = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
            return _text(self.seam.name_of(type(value)), arguments)
        return value


def _text(name: str, arguments: Mapping[str, Any]) -> str:
    return str(Choice(name, dict, arguments))


Bool = Annotated[bool, BeforeValidator(_number_or_bool)]
Integer = Annotated[int, BeforeValidator(_number_or_bool)]
Number = Annotated[float, BeforeValidator(_number)]
Count = Annotated[Integer, Field(ge=1, le=10**9)]
CountOrZero = Annotated[Integer, Field(ge=0, le=10**9)]
Steps = Annotated[Integer, Field(ge=1, le=MAX_LOCAL_STEPS)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Decay = Annotated[Number, Field(ge=0, lt=1)]
Epochs = Annotated[Number, Field(gt=0, le=10**6)]
EpochsOrZero = Annotated[Number, Field(ge=0, le=10**6)]
Seconds = Annotated[Number, Field(ge=0, le=10**9)]
Text = Annotated[str, AfterValidator(_printable)]
Folder = Annotated[Text, AfterValidator(_path)]
Name = Annotated[Folder, AfterValidator(_folder_name)]
# Marks in the metadata of a key
LOCALSGD, OPERATIONAL = "only runs of LocalSGD have it", "it is not part of a run's identity"
