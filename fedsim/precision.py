"""The precision of training: fp32, tf32 or bf16 products, or fp64 for comparisons.

fp32 is IEEE single precision throughout. tf32 and bf16 round the inputs of convolutions and matrix products;
parameters, sums, BN's statistics and the optimizer stay in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def parameter_dtype(precision: str) -> torch.dtype:
    """What parameters and inputs are kept in."""
    return torch.float64 if precision == "fp64" else torch.float32


@contextlib.contextmanager
def products_in(precision: str, device: torch.device) -> Iterator[None]:
    """Within it, this thread's convolutions and matrix products round as `precision` says."""
    if precision == "bf16":
        with torch.autocast(device.type, torch.bfloat16):
            yield
    else:
        yield


def set_tf32(precision: str) -> None:
    """Let CUDA's products round to tf32 only where asked; torch by itself lets convolutions do so."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
