"""Optimizers by name, and their state as named tensors that can be kept, averaged or saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.optim.lamb import LAMB
from fedsim.optim.lars import LARS
from fedsim.optim.torch_base import SGDM

Groups = list[dict[str, Any]]
Named = Mapping[str, Tensor]  # parameters by their names


def parameter_groups(parameters: Sequence[Tensor], weight_decay: float, biases_and_norms: bool) -> Groups:
    """One group that decays and, without `biases_and_norms`, one for these that does not.

    torch-optimizer's LARS gives a group without decay no trust ratio either: it takes the raw rate.
    """
    if biases_and_norms:
        return [{"params": parameters, "weight_decay": weight_decay}]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _sgdm(groups: Groups, config: Config) -> Optimizer:
    # fused: 2.5 times as fast on the CPU as the plain loop, with the same update
    return SGDM(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)


def _lars(groups: Groups, config: Config) -> Optimizer:
    common: dict[str, Any] = {
        "lr": config.lr,
        "momentum": config.momentum,
        "nesterov": config.nesterov,
        "trust_coefficient": config.trust_coefficient,
    }
    if config.optimizer_backend == "torch-optimizer":
        import torch_optimizer

        return torch_optimizer.LARS(groups, **common)
    switches = {"lr_in_momentum": config.lars_lr_in_momentum, "adapt_undecayed": config.lars_adapt_undecayed}
    return LARS(groups, **common, **switches)


def _lamb(groups: Groups, config: Config) -> Optimizer:
    if config.optimizer_backend == "torch-optimizer":
        import torch_optimizer

        return torch_optimizer.Lamb(groups, lr=config.lr, betas=(config.beta1, config.beta2))
    return LAMB(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        bias_correction=config.lamb_bias_correction,
        clamp_value=config.lamb_clamp or None,
        adapt_undecayed=config.lamb_adapt_undecayed,
    )


OPTIMIZERS: dict[str, Callable[[Groups, Config], Optimizer]] = {"sgdm": _sgdm, "lars": _lars, "lamb": _lamb}


def build_optimizer(config: Config, parameters: Named) -> Optimizer:
    """The optimizer of `config` over `parameters`."""
    if config.optimizer not in OPTIMIZERS:
        raise UserError(f"unknown optimizer {config.optimizer}: it must be one of {', '.join(OPTIMIZERS)}")
    groups = parameter_groups(list(parameters.values()), config.weight_decay, config.decay_biases_and_norms)
    return OPTIMIZERS[config.optimizer]([group for group in groups if group["params"]], config)


def set_lr(optimizer: Optimizer, lr: float | Tensor) -> None:
    """Let the next step of every group take the rate `lr`, or that which the tensor `lr` then holds."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_state(parameters: Named, optimizer: Optimizer) -> dict[str, Tensor]:
    """Copies of all that `optimizer` remembers of `parameters`: ``PARAMETER/ENTRY`` -> tensor.

    torch-optimizer's Lamb counts its steps in a Python int, here an int64; the norms of its last step, which
    it notes too, are recomputed and so not part of the state.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[f"{name}/{entry}"] = value.detach().clone()
            elif entry == "step":
                state[f"{name}/{entry}"] = torch.as_tensor(value).clone()
    return state


def load_optimizer_state(parameters: Named, optimizer: Optimizer, state: Mapping[str, Tensor]) -> None:
    """Let `optimizer` remember of `parameters` copies of `state`, and zeros besides: what a new one begins with.

    A tensor that it remembers already is filled, not replaced: a CUDA graph of its step holds it.
    """
    for name, parameter in parameters.items():
        remembered = optimizer.state.get(parameter, {})
        for entry, value in remembered.items():
            if f"{name}/{entry}" not in state:
                remembered[entry] = value.zero_() if isinstance(value, Tensor) else 0
    filled: list[Tensor] = []
    values: list[Tensor] = []
    for key, value in state.items():
        name, _, entry = key.rpartition("/")
        remembered = optimizer.state[parameters[name]]
        if not value.is_floating_point():
            remembered[entry] = int(value)
            continue
        if entry not in remembered:
            remembered[entry] = _room_for(value, parameters[name])
        filled.append(remembered[entry])
        values.append(value)
    if filled:
        torch._foreach_copy_(filled, values)  # a launch for all of a layout, where a GPU would take one for each


def _room_for(value: Tensor, parameter: Tensor) -> Tensor:
    """An empty tensor on the parameter's device, and laid out like it where it has its shape."""
    if value.shape == parameter.shape:
        return torch.empty_like(parameter).detach()
    return torch.empty(value.shape, dtype=value.dtype, device=parameter.device)


def zero_state(config: Config, parameters: Named) -> dict[str, Tensor]:
    """The state of a new optimizer, every entry there and zero: what clients that average theirs begin with."""
    stand_ins = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for stand_in in stand_ins.values():
        stand_in.grad = torch.zeros_like(stand_in)
    optimizer = build_optimizer(config, stand_ins)
    optimizer.step()
    return {name: torch.zeros_like(value) for name, value in optimizer_state(stand_ins, optimizer).items()}
