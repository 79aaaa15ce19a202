"""How much memory the clients of one process need, checked before they are made."""

from __future__ import annotations

import psutil
import torch

from fedsim.config import Config
from fedsim.device import one_thread
from fedsim.errors import UserError
from fedsim.federation.compress import zero_extras, zero_memory
from fedsim.models import initial_model

GIB = 2**30


def check_memory(config: Config, verbose: bool = True) -> None:
    """Print what the clients of `config` need where that is much (`tell`); raise UserError where it is not there."""
    needed, free = needed_bytes(config), free_bytes(config.device)
    what = f"the optimizer states and updates of {config.clients} clients"
    if needed > free:
        other = (
            ", or --momentum-at-sync reset or average"
            if config.momentum_at_sync == "keep"
            else " or a smaller --fraction"
        )
        raise UserError(
            f"clients = {config.clients}: {what} need {needed / GIB:.1f} GiB of memory, but {free / GIB:.1f} GiB are "
            f"free: give fewer clients{other}"
        )
    if verbose and needed > GIB:
        print(f"memory: {what} take up to {needed / GIB:.1f} GiB of {free / GIB:.1f} GiB free", flush=True)


@one_thread()
def needed_bytes(config: Config) -> int:
    """The bytes of all states and updates that exist at once, without models in training and the data set.

    Each client keeps one memory (`zero_memory`), with compression down the model too; a checkpoint of all memories is a
    buffer that is copied as it grows. An update in flight holds the weights and, unless it is reset, a new state.
    """
    model = initial_model(config)
    weights: int = sum(value.nbytes for value in model.state_dict().values())
    memory = sum(value.nbytes for value in zero_memory(config, model).values())
    update = weights + memory + sum(value.nbytes for value in zero_extras(config, model).values())
    model_kept = weights if config.compress_down != "none" else 0
    return config.clients * (3 * memory + model_kept) + config.clients_per_round * update


def free_bytes(device: str) -> int:
    """The memory that is free on `device`, in bytes."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
