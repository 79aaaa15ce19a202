"""The device, threads and precision of a run, and the memory settings of its process."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from fedsim.config import Config, Mode
from fedsim.config.messages import shown
from fedsim.config.types import MAX_THREADS
from fedsim.errors import UserError
from strategies.arguments import split_name

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
BYTES_PER_IMAGE = 12_000  # peak memory per training image while the synthetic set is made, test images included
THREAD_HEAP = 2**26  # bytes, the maximal heap of a thread in glibc
CORES = "FEDSIM_CORES"  # in the environment of a process that has been given a share of its machine


def cpu_count() -> int:
    """The cores that this process may use; raises UserError where its environment gives no number of them."""
    if given := os.environ.get(CORES):
        if not given.isdecimal() or not 1 <= int(given[:60]) <= MAX_THREADS:
            raise UserError(f"{CORES} = {shown(given)} in the environment: give a number of cores, or leave it out")
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve(config: Config, mode: Mode, here: bool = True) -> Config:
    """`config` with its actual device and threads; raises UserError if this machine lacks the device or the memory.

    For a run that is not `here` neither is checked.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if here and kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"device = {device} is not on this machine: give --device cpu or one that is")
    if config.precision == "tf32" and kind != "cuda":
        raise UserError(f"precision = tf32 needs a CUDA device, not {device}: give --precision fp32")
    if here and split_name(config.dataset)[0] == "synthetic":
        _check_memory(config.choice("dataset").arguments["images"])
    # Two clients with a thread each are faster than one client with two threads; with a GPU, a thread only launches
    alone = mode == "centralized" or config.clients == 1
    threads = config.threads or (cpu_count() if alone and kind == "cpu" else 1)
    init = str(Path(config.init).expanduser().absolute()) if config.init else ""  # processes work in other folders
    return config.changed({"device": device, "threads": threads, "init": init})


def _check_memory(images: int) -> None:
    needed, present = images * BYTES_PER_IMAGE, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > present:
        raise UserError(
            f"dataset: synthetic images = {images} needs {needed / 1e9:,.0f} GB of memory, and this machine has "
            f"{present / 1e9:,.0f} GB: give fewer"
        )


def prepare(config: Config) -> None:
    """Apply the threads and precision of `config` (resolved) to torch in this thread."""
    keep_freed_memory()
    torch.set_num_threads(config.threads)
    set_tf32(config.precision)
    torch.backends.cudnn.deterministic = True  # so that a resumed run equals an uninterrupted one bit for bit


@contextmanager
def one_thread() -> Iterator[None]:
    """Context manager and decorator: torch computes on one thread, as the checks before a run do.

    On two images more threads save nothing, and where other processes use the cores they wait for each other: the
    checks of `lenet5` then took ten times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def parameter_dtype(precision: str) -> torch.dtype:
    """The dtype of parameters and inputs."""
    return torch.float64 if precision == "fp64" else torch.float32


def products_in(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Context manager: convolutions and matrix products of this thread have the given `precision`."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def set_tf32(precision: str) -> None:
    """Allow tf32 in CUDA's products only with `precision` = tf32; torch's default allows it in convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def keep_freed_memory() -> None:
    """Let malloc reuse large blocks instead of returning them to the system; results do not change.

    By default glibc maps each large activation again in every step, and the kernel zeroes its pages: a third of the
    time of a step at batch 768. It has no effect with other C libraries than glibc.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_TOP_PAD, 2 * THREAD_HEAP)  # more than the heap of a thread, so that empty ones are not returned


def pool_size(device: torch.device, threads: int) -> int:
    """How many Python threads compute at once, on `threads` cores each: as many as fit the CPU, or one for a GPU."""
    return max(1, cpu_count() // threads) if device.type == "cpu" else 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be allocated, on the CPU or a GPU, by Python, NumPy or torch."""
    of_cpu = "DefaultCPUAllocator: can't allocate memory"  # in the words of torch, whose error has no class of its own
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or of_cpu in str(error)


def thread_pool(device: torch.device, threads: int) -> ThreadPoolExecutor:
    """A pool of `pool_size` Python threads that each compute on `threads` cores.

    torch releases the GIL while it computes. The number of threads of a computation, which can change its last bits,
    does not depend on the machine.
    """
    size = pool_size(device, threads)
    return ThreadPoolExecutor(size, initializer=torch.set_num_threads, initargs=(threads,))
