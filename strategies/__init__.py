"""Server strategies for any Flower project, by name."""

from strategies.local_sgd import LocalSGD
from strategies.tensor_array import TensorArray, tensor_record, tensors_of

STRATEGIES: dict[str, type[LocalSGD]] = {"localsgd": LocalSGD}

__all__ = ["STRATEGIES", "LocalSGD", "TensorArray", "tensor_record", "tensors_of"]
