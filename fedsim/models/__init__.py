"""The networks by name, as plain modules; counter-based dropout; and K copies of a network stacked into one."""

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
    """The model with PyTorch's default initialisation from `seed`, channels-last on `device`.

    Weights are drawn on the CPU, so that they are the same on every device. Channels-last trains 1.3 to 2.8 times
    faster. Raises UserError for an unknown name, and for dropout that `use_counter_based_dropout` does not support.
    """
    with torch.random.fork_rng(devices=[]):  # nn.Module's initialisation uses only the global generator
        torch.manual_seed(int(generator(seed, 0, 0, "init").integers(2**63)))
        model = _network(name, classes)
    return model.to(device, parameter_dtype(precision)).to(memory_format=torch.channels_last)


def blank_model(name: str, classes: int, device: torch.device | str = "cpu", precision: str = "fp32") -> nn.Module:
    """The model in the memory layout of `build_model`, with uninitialised values, for a state_dict to be loaded.

    It draws no random numbers, so that client threads may call it in parallel: two threads that use torch's global
    generator deadlock, one in `get_rng_state`, which holds its lock and waits for the GIL, the other in `manual_seed`.
    """
    with torch.device("meta"):
        model = _network(name, classes)
    # `to_empty` would import SymPy, which takes a second
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
