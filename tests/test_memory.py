from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, threading, torch
from fedsim.device import keep_freed_memory

def faults(blocks, times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        used = [torch.empty(40 * 2**20, dtype=torch.uint8).fill_(1) for _ in range(blocks)]  # a heap holds one
        del used
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if "keep" in sys.argv:
    keep_freed_memory()

def measure():
    faults(1, 20)
    faults(2, 20)
    print(faults(2, 10))

thread = threading.Thread(target=measure)
(thread.start if "thread" in sys.argv else thread.run)()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.parametrize("where", ["process", "thread"])
def test_a_large_block_is_paged_in_once_and_not_at_every_use(where: str) -> None:
    def faults(*arguments: str) -> int:
        command = [sys.executable, "-c", FAULTS, where, *arguments]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert faults() > 100
    assert faults("keep") < 10  # two in a turn, were a heap of a thread given back
