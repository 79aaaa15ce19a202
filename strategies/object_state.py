"""The attributes of an object as plain values for a checkpoint, and back.

Plain values are numbers, text, bytes, None, and for everything else dicts with one entry, ``{KIND: content}``: NumPy
arrays, scalars and generators, tensors, Flower's records, and Python's containers.
``torch.load(weights_only=True)`` reads them.
"""

from __future__ import annotations

import enum
import logging
import re
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from torch import Tensor

from strategies.tensor_array import CopiedArray, tensor_record

PLAIN = (type(None), bool, int, float, str, bytes)
CONTAINERS: dict[str, type] = {"list": list, "tuple": tuple, "set": set}
MAPPINGS: dict[str, Callable[[Any], Any]] = {
    kind.__name__: kind for kind in (dict, OrderedDict, MetricRecord, ConfigRecord)
}
CONSTANT = (  # types of values without state, which the object's constructor makes again
    *(type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType),
    *(np.ufunc, np.dtype, torch.dtype, torch.device, logging.Logger, PurePath, enum.Enum, re.Pattern),
)


class NotPlain(Exception):
    """An attribute cannot be saved in a checkpoint; the message names it."""


def state_of(instance: object, new: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of `instance` as plain values, without constants that are also in `new`, those of a new instance.

    Raises NotPlain where an attribute can be neither saved nor made again.
    """
    state = {}
    for name, value in vars(instance).items():
        if isinstance(value, CONSTANT) and _is_same(value, new.get(name)):
            continue
        try:
            state[name] = _encoded(value)
        except TypeError as error:
            raise NotPlain(f"its attribute {name} holds a {error}") from error
    return state


def set_state(instance: object, state: dict[str, Any]) -> None:
    """Set the attributes of `instance` to copies of those in `state`."""
    vars(instance).update({name: _decoded(value) for name, value in state.items()})


def _is_same(value: object, other: object) -> bool:
    """Whether two constants are equal, or are functions and methods with the same code."""
    return value == other or (hasattr(value, "__code__") and value.__code__ is getattr(other, "__code__", None))


def _encoded(value: Any) -> Any:
    """`value` as plain values; raises TypeError with the name of a type that cannot be saved."""
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind in CONTAINERS.values():
        return {kind.__name__: [_encoded(each) for each in value]}
    if kind in MAPPINGS.values():
        return {kind.__name__: [[_encoded(key), _encoded(each)] for key, each in value.items()]}
    if isinstance(value, ArrayRecord):
        return {"ArrayRecord": [[name, _tensor(array.numpy())] for name, array in value.items()]}
    if isinstance(value, Array):
        return {"Array": _tensor(value.numpy())}
    if kind is np.ndarray:
        return {"ndarray": _tensor(value)}
    if isinstance(value, np.generic):
        return {"scalar": _tensor(np.asarray(value))}
    if kind is np.random.Generator:
        return {"Generator": _encoded(value.bit_generator.state)}
    if kind is Tensor:
        return {"Tensor": value.detach().cpu().clone()}
    raise TypeError(kind.__name__)


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """A tensor with a copy of the values; raises TypeError where torch has no such type."""
    try:
        return torch.from_numpy(np.array(array, order="C"))
    except (TypeError, ValueError) as error:
        raise TypeError(f"NumPy array of {array.dtype}") from error


def _decoded(value: Any) -> Any:
    """The inverse of `_encoded`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind in CONTAINERS:
        return CONTAINERS[kind](_decoded(each) for each in content)
    if kind in MAPPINGS:
        return MAPPINGS[kind]({_decoded(key): _decoded(each) for key, each in content})
    return DECODE[kind](content)


def _generator(encoded: Any) -> np.random.Generator:
    state = _decoded(encoded)
    generator = np.random.Generator(getattr(np.random, state["bit_generator"])())
    generator.bit_generator.state = state
    return generator


DECODE: dict[str, Callable[[Any], Any]] = {
    "ArrayRecord": lambda pairs: tensor_record(dict(pairs), CopiedArray),
    "Array": CopiedArray,
    "ndarray": lambda tensor: tensor.numpy().copy(),
    "scalar": lambda tensor: tensor.numpy()[()],
    "Generator": _generator,
    "Tensor": torch.clone,
}
