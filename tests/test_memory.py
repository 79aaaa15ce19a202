from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, threading, torch
from fedsim.device import keep_freed_memory

def faults(blocks, times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        used = [torch.empty(40 * 2**20, dtype=torch.uint8).fill_(1) for _ in range(blocks)]  # a heap holds one
        del used
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def measure():
    faults(1, 5)
    faults(2, 15)  # until the heap has room for two at any place of other blocks
    print(faults(2, 5))

def measure_in_both():
    measure()
    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()

measure_in_both()
keep_freed_memory()
measure_in_both()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_large_block_is_paged_in_once_and_not_at_every_use() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True)
    process, thread, process_that_keeps, thread_that_keeps = map(int, done.stdout.split())
    assert min(process, thread) > 100
    assert max(process_that_keeps, thread_that_keeps) < 10  # two in a turn, were a heap of a thread given back
