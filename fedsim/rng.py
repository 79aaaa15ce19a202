"""Random streams: one per (seed, worker, round, purpose), never the process's global state.

Shuffling and augmentation are drawn by NumPy on the CPU, so that a run sees the same batches on every device.
Dropout masks are drawn on the device itself and so depend on its kind.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

Purpose = Literal["shard", "init", "shuffle", "augment", "dropout", "validation"]
_CODES: dict[Purpose, int] = {"shard": 0, "init": 1, "shuffle": 2, "augment": 3, "dropout": 4, "validation": 5}


def _sequence(seed: int, worker: int, round: int, purpose: Purpose) -> np.random.SeedSequence:
    return np.random.SeedSequence((seed, worker, round, _CODES[purpose]))


def numpy_stream(seed: int, worker: int, round: int, purpose: Purpose) -> np.random.Generator:
    """A NumPy generator of this stream's own."""
    return np.random.default_rng(_sequence(seed, worker, round, purpose))


def begin_stream(generator: torch.Generator, seed: int, worker: int, round: int, purpose: Purpose) -> None:
    """Let `generator`, which a CUDA graph may hold, draw this stream from its beginning."""
    state = int(_sequence(seed, worker, round, purpose).generate_state(1, np.uint64)[0])
    generator.manual_seed(state & (2**63 - 1))
