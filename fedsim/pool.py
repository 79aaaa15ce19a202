"""A thread for each core, every one with its own share of torch's threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from fedsim.config import cpu_count


def thread_pool(device: torch.device, threads: int) -> ThreadPoolExecutor:
    """Python threads whose torch work takes `threads` cores each; together all cores, or one for a GPU.

    torch holds no lock while it computes, and the number of threads of a computation (which can change its
    last bits) stays what was asked for, whatever the machine's cores.
    """
    workers = max(1, cpu_count() // threads) if device.type == "cpu" else 1
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,))
