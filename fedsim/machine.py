"""What `auto` means on this machine: the device and the CPU threads of a run."""

from __future__ import annotations

import torch

from fedsim.config import Config, Mode, cpu_count
from fedsim.errors import UserError
from fedsim.memory import keep_freed_memory
from fedsim.precision import set_tf32


def resolve(config: Config, mode: Mode, here: bool = True) -> Config:
    """`config` with the device and threads that it will run on; a device that is not there fails.

    A run that will not be `here` may name a GPU that this machine does not have.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if here and kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"device = {device} is not on this machine: give --device cpu or one that is")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("device = mps is not on this machine: give --device cpu or one that is")
    if config.precision == "tf32" and kind != "cuda":
        raise UserError(f"precision = tf32 needs a CUDA device, not {device}: give --precision fp32")
    # Two clients on a thread each train faster than one client on two threads; on a GPU the CPU only launches.
    threads = config.threads or (cpu_count() if mode == "centralized" and kind == "cpu" else 1)
    return config.changed({"device": device, "threads": threads})


def prepare(config: Config) -> None:
    """Let torch compute in this thread as `config` (resolved) says."""
    keep_freed_memory()
    torch.set_num_threads(config.threads)
    set_tf32(config.precision)
    torch.backends.cudnn.deterministic = True  # a run that goes on is, bit for bit, one that never stopped
