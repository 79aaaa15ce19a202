"""How much memory the clients of one process need, checked before they are made."""

from __future__ import annotations

from collections.abc import Mapping

import psutil
import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.device import one_thread
from fedsim.errors import UserError
from fedsim.federation.shapes import zeros_of
from fedsim.models import initial_model
from fedsim.training.methods import field_of, layers_of
from strategies.arguments import kebab

GIB = 2**30


def check_memory(config: Config) -> None:
    """Print what the clients of `config` need where that is much; raise UserError where it is not there."""
    needed, free = needed_bytes(config), free_bytes(config.device)
    what = f"the optimizer states and updates of {config.clients} clients"
    if needed > free:
        zero = zeros_of(config, initial_model(config))
        keep = [kebab(field_of(name)) for name, layer in layers_of(config) if layer.keeps(zero)]
        other = "".join(f", another --{key}" for key in keep)
        raise UserError(
            f"clients = {config.clients}: {what} need {needed / GIB:.1f} GiB of memory, but {free / GIB:.1f} GiB are "
            f"free: give fewer clients{other} or a smaller --fraction"
        )
    if needed > GIB:
        print(f"memory: {what} take up to {needed / GIB:.1f} GiB of {free / GIB:.1f} GiB free", flush=True)


@one_thread()
def needed_bytes(config: Config) -> int:
    """The bytes of all states and updates that exist at once, without models in training and the data set.

    Each client keeps one memory, and the model too where messages do not hold all of it; a checkpoint of all memories
    is a buffer that is copied as it grows. An update in flight holds the weights, what layers send, and the next
    memory.
    """
    model = initial_model(config)
    layers, zero = layers_of(config), zeros_of(config, model)
    weights = _bytes(model.state_dict())
    memory = _bytes(layers.zero_memory(zero))
    update = weights + memory + sum(map(_bytes, layers.initial(zero).values()))
    model_kept = weights if layers.keeps_model else 0
    return config.clients * (3 * memory + model_kept) + config.clients_per_round * update


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def free_bytes(device: str) -> int:
    """The memory that is free on `device`, in bytes."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
