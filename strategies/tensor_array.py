"""Flower arrays that hold a tensor on its device, and are serialized only when their bytes are read.

Within one process nothing reads them: messages pass tensors on without a copy. In a message that leaves the process
(Ray, a SuperLink) such an array becomes one of Flower's own.
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
    """A Flower array that holds `tensor`, which must not change any more."""

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
        """Serialized as a plain array, the only kind that the receiver knows."""
        return self._plain().deflate()

    def _plain(self) -> Array:
        return Array(self.numpy())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as a plain array."""
        return Array, (self.dtype, self.shape, self.stype, self.data)


class CopiedArray(TensorArray):
    """A `TensorArray` whose `numpy` returns a copy, which may be changed."""

    def numpy(self) -> NDArray[Any]:
        return super().numpy().copy()


def tensor_record(tensors: Mapping[str, Tensor], kind: type[TensorArray] = TensorArray) -> ArrayRecord:
    """A Flower record of `tensors`, which must not change any more, as arrays of the class `kind`.

    They are set one by one: ArrayRecord's constructor would copy them into plain arrays.
    """
    record = ArrayRecord()
    for name, tensor in tensors.items():
        record[name] = kind(tensor)
    return record


def tensors_of(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of any Flower record, not copied where it holds tensors."""
    return {name: tensor_of(array) for name, array in record.items()}


def tensor_of(array: Array) -> Tensor:
    """The tensor of any Flower array; raises what NumPy raises for bytes that are no array."""
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
