"""Flower arrays that hold a tensor where it is, on whatever device, and have bytes only when something asks.

Within one process nothing asks: messages hand tensors over as they are. Where a message leaves the process (Ray,
a SuperLink) such an array becomes a plain one on its way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray
from torch import Tensor

NPY_HEADER = 1024  # bytes that an array may come with beside its values


class TensorArray(Array):
    """A Flower array around `tensor`, which must not change any more."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.dtype = dtype_name(tensor)
        self.shape = tuple(tensor.shape)
        self.stype = "numpy.ndarray"

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The bytes that Flower would send."""
        return self._plain().data

    def numpy(self) -> NDArray[Any]:
        """The values on the CPU."""
        values: NDArray[Any] = np.ascontiguousarray(self.tensor.cpu().numpy())
        return values.reshape(self.shape)  # ascontiguousarray gives a scalar a dimension

    @property
    def children(self) -> dict[str, Any]:
        return self._plain().children

    def deflate(self) -> bytes:
        """As a plain array: the receiver knows no other."""
        return self._plain().deflate()

    def _plain(self) -> Array:
        return Array(self.numpy())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as a plain array."""
        return Array, (self.dtype, self.shape, self.stype, self.data)


def tensor_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """A Flower record of `tensors`, which must not change any more.

    They are set one by one: ArrayRecord's constructor would copy them into plain arrays.
    """
    record = ArrayRecord()
    for name, tensor in tensors.items():
        record[name] = TensorArray(tensor)
    return record


def tensors_of(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of any Flower record, not copied where it holds tensors."""
    return {name: tensor_of(array) for name, array in record.items()}


def tensor_of(array: Array) -> Tensor:
    """The tensor of any Flower array; bytes that are no array fail as NumPy does."""
    return array.tensor if isinstance(array, TensorArray) else torch.from_numpy(array.numpy())


def tensors_like(record: ArrayRecord, sent: Mapping[str, Array]) -> dict[str, Tensor]:
    """The tensors of a record from elsewhere, which must hold arrays like those `sent`, under their names.

    Fails with a ValueError that says what is wrong with it; bytes are not believed, nor read where they are too many.
    """
    if record.keys() != sent.keys():
        raise ValueError(f"its arrays are others than those sent: {sorted(record.keys() ^ sent.keys())[0]}")
    return {name: _tensor_like(name, record[name], array) for name, array in sent.items()}


def _tensor_like(name: str, array: Array, sent: Array) -> Tensor:
    expected = sent.dtype, tuple(sent.shape)
    if (array.dtype, tuple(array.shape)) != expected:
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, not as it was sent")
    if not isinstance(array, TensorArray) and len(array.data) > (most := array_bytes(sent) + NPY_HEADER):
        raise ValueError(f"{name} holds {len(array.data)} bytes, more than {most}")
    try:
        tensor = tensor_of(array)
    except Exception as error:  # whatever NumPy makes of foreign bytes
        raise ValueError(f"{name} cannot be read ({error})") from error
    if (dtype_name(tensor), tuple(tensor.shape)) != expected:  # its bytes say otherwise than it does
        raise ValueError(f"{name} is {dtype_name(tensor)} {list(tensor.shape)}, not as it was sent")
    return tensor


def dtype_name(tensor: Tensor) -> str:
    """The dtype as Flower and NumPy write it, for instance float32."""
    return str(tensor.dtype).removeprefix("torch.")


def array_bytes(array: Array) -> int:
    """The bytes of an array's values."""
    return np.dtype(array.dtype).itemsize * math.prod(array.shape)
