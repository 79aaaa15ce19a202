"""Flower arrays that hold a tensor where it is, on whatever device, and have bytes only when something asks.

Within one process nothing asks: messages hand tensors over as they are. Where a message leaves the process (Ray,
a SuperLink) such an array becomes a plain one on its way.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray
from torch import Tensor

# NumPy parses an array's header as Python source, which CPython before 3.11.8 may fail at in several threads at once
# ("AST constructor recursion depth mismatch", CPython issue 106905)
_one_header_at_a_time = threading.Lock()


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


class CopiedArray(TensorArray):
    """A `TensorArray` whose values are copied for whoever asks for them, and may be changed there."""

    def numpy(self) -> NDArray[Any]:
        return super().numpy().copy()


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
    if isinstance(array, TensorArray):
        return array.tensor
    with _one_header_at_a_time:
        return torch.from_numpy(array.numpy())


def dtype_name(tensor: Tensor) -> str:
    """The dtype as Flower and NumPy write it, for instance float32."""
    return str(tensor.dtype).removeprefix("torch.")


def array_bytes(array: Array) -> int:
    """The bytes of an array's values."""
    return np.dtype(array.dtype).itemsize * math.prod(array.shape)


def payload_bytes(record: ArrayRecord) -> int:
    """The bytes of the values in `record`, as they travel: NumPy's headers are not counted.

    What a client's array says of its size is not believed.
    """
    return sum(map(_payload_bytes, record.values()))


def _payload_bytes(array: Array) -> int:
    if isinstance(array, TensorArray):
        return array.tensor.nbytes
    data = array.data
    header = 10 + int.from_bytes(data[8:10], "little") if data.startswith(b"\x93NUMPY\x01") else 0
    return max(0, len(data) - header)
