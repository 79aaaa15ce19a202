"""Server strategies for any Flower project, by name."""

from strategies.batchnorm import batchnorm_buffers
from strategies.local_sgd import LocalSGD
from strategies.screening import DECLINED, printable, tensors_like, wrong_values
from strategies.sections import buffers_of, join, sections, split
from strategies.tensor_array import TensorArray, payload_bytes, tensor_record, tensors_of

STRATEGIES: dict[str, type[LocalSGD]] = {"localsgd": LocalSGD}

__all__ = [
    "DECLINED",
    "STRATEGIES",
    "LocalSGD",
    "TensorArray",
    "batchnorm_buffers",
    "buffers_of",
    "join",
    "payload_bytes",
    "printable",
    "sections",
    "split",
    "tensor_record",
    "tensors_like",
    "tensors_of",
    "wrong_values",
]
