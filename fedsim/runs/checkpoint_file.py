"""The format of a checkpoint file: the output of `torch.save`, a seal, and the SHA-256 of that output."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from fedsim.system.copies import on_host

SEAL = b"fedsim checkpoint, SHA-256: "


def kind_of(kind: Any) -> TypeAdapter[Any]:
    """What `mismatch` accepts in place of an example: any value of this type."""
    return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))


class InvalidCheckpoint(Exception):
    """Why a run cannot be resumed from a checkpoint."""


def serialize(content: Mapping[str, Any]) -> bytes:
    """The output of `torch.save`, in memory: when it writes to a file itself, its error hides the cause."""
    buffer = io.BytesIO()
    torch.save(on_host(content), buffer)
    # Not getbuffer(): its view, in a frame that an exception keeps, can crash the garbage collector of CPython 3.12.1
    return buffer.getvalue()


def seal(serialized: bytes | memoryview) -> bytes:
    """What follows `serialized` in its file."""
    return SEAL + hashlib.sha256(serialized).digest()


def parse_checkpoint(content: bytes) -> dict[str, Any]:
    """The checkpoint in the `content` of its file; raises `InvalidCheckpoint` if any byte has changed."""
    size = len(SEAL) + hashlib.sha256().digest_size
    serialized = memoryview(content)[:-size]
    if content[-size:] != seal(serialized):
        older = content[-22:-18] == b"PK\5\6"  # the end of a zip file: version 2 had no seal
        raise InvalidCheckpoint("is of another version of fedsim" if older else "is damaged")
    try:
        checkpoint = torch.load(io.BytesIO(serialized), map_location="cpu", weights_only=True)
    except Exception as error:  # torch does not document what it raises
        raise InvalidCheckpoint("is damaged") from error
    if not isinstance(checkpoint, dict):
        raise InvalidCheckpoint("is damaged")
    return checkpoint


class Open(dict[str, Any]):
    """What a mapping of mappings holds at least."""


def mismatch(state: Mapping[str, Any], like: Mapping[str, Any]) -> str:
    """The first difference of `state` from `like` in keys, types or shapes, or "".

    Where `like` has a `TypeAdapter`, that decides. A mapping within `state` has no other keys than that in `like`,
    unless that is `Open`.
    """
    for name, wanted in like.items():
        if name not in state:
            return f"it has no {name}"
        value = state[name]
        if isinstance(wanted, TypeAdapter):
            if problem := _invalid(value, wanted):
                return f"{name} {problem}"
        elif isinstance(wanted, Tensor) and isinstance(value, Tensor):
            if (value.shape, value.dtype) != (wanted.shape, wanted.dtype):
                return f"{name} is {value.dtype} {list(value.shape)}, not {wanted.dtype} {list(wanted.shape)}"
        elif isinstance(wanted, Mapping) and isinstance(value, Mapping):
            if difference := mismatch(value, wanted):
                return f"in {name}, {difference}"
            for other in value.keys() - wanted.keys():
                if not isinstance(wanted, Open):
                    return f"in {name}, it has {other}"
                if not isinstance(value[other], dict):
                    return f"in {name}, {other} is of type {type(value[other]).__name__}, not dict"
        elif type(value) is not type(wanted):
            return f"{name} is of type {type(value).__name__}, not {type(wanted).__name__}"
    return ""


def _invalid(value: object, kind: TypeAdapter[Any]) -> str:
    try:
        kind.validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return f"is not valid: {first['msg']}"
    return ""
