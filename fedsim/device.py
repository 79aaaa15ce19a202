"""The device and threads of a run, its precision, and how this process's memory and threads are used."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from fedsim.config import Config, Mode, cpu_count
from fedsim.errors import UserError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
BYTES_PER_IMAGE = 12_000  # of the synthetic set while it is made, its quarter of test images included
THREAD_HEAP = 2**26  # bytes: glibc's largest heap of a thread


def resolve(config: Config, mode: Mode, here: bool = True) -> Config:
    """`config` with the device and threads that it will run on; fails if this machine lacks the device or the memory.

    A run that will not be `here` may name a GPU that this machine does not have.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if here and kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"device = {device} is not on this machine: give --device cpu or one that is")
    if config.precision == "tf32" and kind != "cuda":
        raise UserError(f"precision = tf32 needs a CUDA device, not {device}: give --precision fp32")
    if here and config.dataset == "synthetic":
        _check_memory(config.synthetic_images)
    # Two clients on a thread each train faster than one client on two threads; on a GPU the CPU only launches.
    threads = config.threads or (cpu_count() if mode == "centralized" and kind == "cpu" else 1)
    return config.changed({"device": device, "threads": threads})


def _check_memory(images: int) -> None:
    needed, present = images * BYTES_PER_IMAGE, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > present:
        raise UserError(
            f"synthetic-images = {images} needs {needed / 1e9:,.0f} GB of memory, and this machine has "
            f"{present / 1e9:,.0f} GB: give fewer"
        )


def prepare(config: Config) -> None:
    """Let torch compute in this thread as `config` (resolved) says."""
    keep_freed_memory()
    torch.set_num_threads(config.threads)
    set_tf32(config.precision)
    torch.backends.cudnn.deterministic = True  # a resumed run equals an uninterrupted one bit for bit


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


def keep_freed_memory() -> None:
    """Let this process's malloc reuse large blocks and give none back to the system.

    By itself glibc maps each large activation anew in every step, and the system zeroes it page by page: a third of the
    time of a step at batch 768. Only where blocks come from changes. Other C libraries than glibc are left as they are.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_TOP_PAD, 2 * THREAD_HEAP)  # more than a thread's empty heap: it is not given back either


def thread_pool(device: torch.device, threads: int) -> ThreadPoolExecutor:
    """Python threads whose torch work takes `threads` cores each; together all cores, or one for a GPU.

    torch holds no lock while it computes, and the number of threads of a computation (which can change its
    last bits) stays what was asked for, whatever the machine's cores.
    """
    workers = max(1, cpu_count() // threads) if device.type == "cpu" else 1
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,))
