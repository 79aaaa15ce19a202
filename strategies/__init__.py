"""Server strategies for any Flower project, by name."""

from strategies.local_sgd import DECLINED, LocalSGD, sample_size
from strategies.tensor_array import TensorArray, array_bytes, tensor_record, tensors_like, tensors_of

STRATEGIES: dict[str, type[LocalSGD]] = {"localsgd": LocalSGD}

__all__ = [
    "DECLINED",
    "STRATEGIES",
    "LocalSGD",
    "TensorArray",
    "array_bytes",
    "sample_size",
    "tensor_record",
    "tensors_like",
    "tensors_of",
]
