"""Held for what runs in several threads of one process, each a call of `fedsim.localsgd`, must not do at once."""

from __future__ import annotations

import threading

# To use the global generators of torch, NumPy or Python, as the initialisation of a model has to: another thread would
# see the draws, and two that use torch's deadlock (one in `get_rng_state`, which holds its lock and waits for the GIL,
# the other in `manual_seed`)
GLOBAL_GENERATORS = threading.RLock()

# To read data sets, which one thread reads for all, and whatever is parsed as Python, as NumPy does with the header of
# an array: CPython before 3.11.8 fails where several threads parse
READING = threading.RLock()
