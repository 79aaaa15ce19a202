"""Server strategies for any Flower project, by name."""

from strategies.local_sgd import LocalSGD, sample_size
from strategies.tensor_array import TensorArray, array_bytes, dtype_name, tensor_record, tensors_of

STRATEGIES: dict[str, type[LocalSGD]] = {"localsgd": LocalSGD}

__all__ = [
    "STRATEGIES",
    "LocalSGD",
    "TensorArray",
    "array_bytes",
    "dtype_name",
    "sample_size",
    "tensor_record",
    "tensors_of",
]
