"""Server strategies for any Flower project, by name."""

from strategies.local_sgd import LocalSGD, sample_size
from strategies.tensor_array import TensorArray, tensor_record, tensors_of

STRATEGIES: dict[str, type[LocalSGD]] = {"localsgd": LocalSGD}

__all__ = ["STRATEGIES", "LocalSGD", "TensorArray", "sample_size", "tensor_record", "tensors_of"]
