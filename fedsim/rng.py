"""Random numbers as functions of (seed, worker, local step, purpose), never of global state.

Initial weights, shards and shuffles, drawn once per run or per pass over a shard, use NumPy generators. Crops, flips
and dropout masks, drawn in every local step, are counter-based as in SplitMix64 (Steele, Lea and Flood 2014): number i
of a step is a hash of the step's key and i. These need no state, can be computed for all steps of a round at once and
within a CUDA graph, and have the same bits on every device. Nothing depends on the round: runs that differ in J, or
were interrupted, draw the same numbers at the same local step.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Purpose = Literal[
    "shard",
    "init",
    "shuffle",
    "augment",
    "dropout",
    "validation",
    "compress",
    "broadcast",
    "batchnorm",
    "workers",
    "test-share",
]
_CODES = {purpose: code for code, purpose in enumerate(get_args(Purpose))}  # add new purposes at the end
_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64's constants


def generator(seed: int, worker: int, index: int, purpose: Purpose) -> np.random.Generator:
    """A NumPy generator; `index` distinguishes the shuffles of a worker, and is 0 for what is drawn once per run."""
    return np.random.default_rng(np.random.SeedSequence((seed, worker, index, _CODES[purpose])))


def step_keys(seed: int, worker: int, first_step: int, steps: int, purpose: Purpose) -> NDArray[np.uint64]:
    """(steps,) keys for `random_words` of a worker's local steps `first_step`, `first_step` + 1, ..."""
    base = np.random.SeedSequence((seed, worker, _CODES[purpose])).generate_state(1, np.uint64)
    return _mix(base + _counters(first_step, steps))


def random_words(keys: NDArray[np.uint64], count: int) -> NDArray[np.uint64]:
    """(len(keys), count) random 64-bit words: the first `count` numbers of each step."""
    return _mix(_mix(_counters(0, count)) + keys[:, None])


def random_words_on_device(keys: Tensor, count: int, first: int = 0) -> Tensor:
    """(len(keys), count) the same words as int64 on the device of `keys` (N,) int64, starting at number `first`."""
    numbers = torch.arange(first + 1, first + count + 1, device=keys.device)
    return _mix_on_device(_mix_on_device(numbers * _signed(_GAMMA)) + keys[:, None])


def _counters(first: int, count: int) -> NDArray[np.uint64]:
    return np.arange(first + 1, first + count + 1, dtype=np.uint64) * np.uint64(_GAMMA)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's bijection of 64-bit words; products wrap around."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(_MIX_1)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(_MIX_2)
    return words ^ (words >> np.uint64(31))


def _mix_on_device(words: Tensor) -> Tensor:
    """`_mix` for int64 tensors, whose arithmetic shifts are masked to logical ones."""
    words = (words ^ ((words >> 30) & (2**34 - 1))) * _signed(_MIX_1)
    words = (words ^ ((words >> 27) & (2**37 - 1))) * _signed(_MIX_2)
    return words ^ ((words >> 31) & (2**33 - 1))


def _signed(value: int) -> int:
    """The int64 that has the bits of the unsigned 64-bit `value`."""
    return value - 2**64 if value >= 2**63 else value
