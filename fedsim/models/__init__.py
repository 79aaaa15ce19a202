"""The networks, by name: plain modules that know nothing of workers or replicas."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fedsim.device import parameter_dtype
from fedsim.errors import UserError
from fedsim.models.dropout import use_counter_based_dropout
from fedsim.models.lenet import LeNet5, LeNetBN
from fedsim.rng import generator

MODELS: dict[str, Callable[[int], nn.Module]] = {"lenet-bn": LeNetBN, "lenet5": LeNet5}  # number of classes -> model


def build_model(
    name: str, classes: int, seed: int, device: torch.device | str = "cpu", precision: str = "fp32"
) -> nn.Module:
    """The model with PyTorch's default initialisation drawn from `seed`, channels-last on `device`.

    It is drawn on the CPU: the same weights on every device. Channels-last trains 1.3 to 2.8 times faster.
    """
    with torch.random.fork_rng(devices=[]):  # nn.Module's initialisation knows only the global stream
        torch.manual_seed(int(generator(seed, 0, 0, "init").integers(2**63)))
        model = _network(name, classes)
    return model.to(device, parameter_dtype(precision)).to(memory_format=torch.channels_last)


def blank_model(name: str, classes: int, device: torch.device | str = "cpu", precision: str = "fp32") -> nn.Module:
    """The model in the memory layout of `build_model`, its values uninitialised: for others to be loaded.

    It draws nothing, so that client threads may build theirs at once: two that touch torch's global stream
    deadlock, one in `get_rng_state`, which holds its lock and waits for the GIL, one in `manual_seed`.
    """
    with torch.device("meta"):
        model = _network(name, classes)
    # What `to_empty` does, without the second that it takes to import SymPy for it
    shapes = model.state_dict()
    values = {name: torch.empty(value.shape, dtype=value.dtype, device=device) for name, value in shapes.items()}
    if left_out := dict(model.named_buffers()).keys() - shapes.keys():
        raise UserError(f"model {name}: every buffer must be persistent, {', '.join(sorted(left_out))} is not")
    model.load_state_dict(values, assign=True)
    return model.to(parameter_dtype(precision)).to(memory_format=torch.channels_last)


def _network(name: str, classes: int) -> nn.Module:
    if name not in MODELS:
        raise UserError(f"unknown model {name}: it must be one of {', '.join(MODELS)}")
    model = MODELS[name](classes)
    use_counter_based_dropout(model)
    return model
