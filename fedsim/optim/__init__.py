"""Optimizers by name (SGD with momentum, LARS, LAMB, PyTorch's), and their state as named tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.optim.lr_schedule import check_shape
from fedsim.optim.named import sgdm
from fedsim.optim.torch_optimizers import NEW_STATE, TORCH_OPTIMIZERS, can_be_captured, form_of
from fedsim.registry import failures_of
from fedsim.system.copies import copies, fill
from strategies.arguments import Choice

Named = Mapping[str, Tensor]  # parameters by their names
NOT_STATE = ("weight_norm", "adam_norm", "trust_ratio")  # stored by torch-optimizer's Lamb, computed anew in each step


def build_optimizer(config: Config, parameters: Named) -> Optimizer:
    """The optimizer of `config` over `parameters`.

    One group has weight decay; without `decay-biases-and-norms`, 1-dim parameters are in a second one without it. In
    groups without decay LARS uses no trust ratio, by default here and always in torch-optimizer.
    """
    decayed = [p for p in parameters.values() if config.decay_biases_and_norms or p.ndim > 1]
    undecayed = [p for p in parameters.values() if not config.decay_biases_and_norms and p.ndim <= 1]
    parts = [(decayed, config.weight_decay), (undecayed, 0.0)]
    groups: list[dict[str, Any]] = [{"params": part, "weight_decay": decay} for part, decay in parts if part]
    choice = config.choice("optimizer")
    of_run = {"momentum": config.momentum} if takes_momentum(choice) else {}
    try:
        form = form_of(choice.kind, groups[0]["params"][0].device.type)
        optimizer: Optimizer = choice.make(groups, lr=config.lr, **of_run, **form)
    except Exception as error:  # arguments that do not go together, or that PyTorch refuses
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"optimizer = {config.optimizer}: {reason}") from error
    return optimizer


def takes_momentum(choice: Choice) -> bool:
    """Whether an optimizer has the key momentum, and not an argument of its own or none."""
    return "momentum" in inspect.signature(choice.kind).parameters and "momentum" not in choice.arguments


def check_optimizer(config: Config) -> None:
    """Raise UserError where the optimizer fails in a step, or it or the schedule does not use a key."""
    choice = config.choice("optimizer")
    if config.momentum != Config().momentum and not takes_momentum(choice):
        own = f", or give {choice.name}:momentum={config.momentum}" if "momentum" in choice.arguments else ""
        raise UserError(f"momentum is not used by optimizer = {config.optimizer}: leave it out{own}")
    check_shape(config)
    if config.schedule_unit == "epoch" and config.schedule == "constant" and not config.warmup_epochs:
        raise UserError("schedule-unit is not used by a constant rate: leave it out, or give --schedule")
    parameter = torch.zeros(1)
    parameter.grad = torch.zeros(1)
    optimizer = build_optimizer(config, {"": parameter})
    with failures_of(f"optimizer = {config.optimizer} fails in a step"):
        optimizer.step()
    if not parameter.isfinite():
        raise UserError(
            f"optimizer = {config.optimizer} divides zero by zero where a gradient is zero: give an eps above 0"
        )
    for entry, value in optimizer.state[parameter].items():
        if not isinstance(value, Tensor | int | None):
            raise UserError(f"optimizer = {config.optimizer}: its state {entry} is no tensor, and cannot be saved")


def is_capturable(config: Config) -> bool:
    """Whether a step of the optimizer of `config` can be part of a CUDA graph."""
    choice = config.choice("optimizer")
    if choice.kind in TORCH_OPTIMIZERS.values():
        return can_be_captured(choice.kind)
    return choice.arguments.get("backend") == "fedsim" or choice.kind is sgdm  # torch-optimizer's synchronize


def set_lr(optimizer: Optimizer, lr: float | Tensor) -> None:
    """Set the learning rate of all parameter groups: a float, or a tensor that is read at each step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_state(parameters: Named, optimizer: Optimizer) -> dict[str, Tensor]:
    """Copies of the state of `parameters`: ``PARAMETER/ENTRY`` -> tensor.

    The step count of torch-optimizer's Lamb, a Python int, becomes an int64 tensor.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if value is not None and entry not in NOT_STATE:
                state[f"{name}/{entry}"] = torch.as_tensor(value)
    return copies([state])[0]


def load_optimizer_state(parameters: Named, optimizer: Optimizer, state: Mapping[str, Tensor]) -> None:
    """Load `state` into `optimizer`; entries that `state` lacks become those of a new optimizer.

    Existing tensors are filled in place, since CUDA graphs of the step refer to them.
    """
    absent: list[Tensor] = []
    for name, parameter in parameters.items():
        entries = optimizer.state.get(parameter, {})
        for entry, value in entries.items():
            if f"{name}/{entry}" in state:
                continue
            if not isinstance(value, Tensor):
                entries[entry] = 0
            elif entry in NEW_STATE:
                value.fill_(NEW_STATE[entry])
            else:
                absent.append(value)
    if absent:
        torch._foreach_zero_(absent)
    filled: list[Tensor] = []
    values: list[Tensor] = []
    for key, value in state.items():
        name, _, entry = key.rpartition("/")
        entries = optimizer.state[parameters[name]]
        if not value.is_floating_point():
            entries[entry] = int(value)
            continue
        if entry not in entries:
            entries[entry] = _empty_entry(value, parameters[name])
        filled.append(entries[entry])
        values.append(value)
    fill(filled, values)


def _empty_entry(value: Tensor, parameter: Tensor) -> Tensor:
    """An empty tensor for `value` on the parameter's device, in its memory layout if the shapes are equal."""
    if value.shape == parameter.shape:
        return torch.empty_like(parameter).detach()
    return torch.empty(value.shape, dtype=value.dtype, device=parameter.device)


def zero_state(config: Config, parameters: Named) -> dict[str, Tensor]:
    """The state of a new optimizer with all entries that a step creates: the initial state where clients average it."""
    zeros = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for zero in zeros.values():
        zero.grad = torch.zeros_like(zero)
    optimizer = build_optimizer(config, zeros)
    optimizer.step()
    state = optimizer_state(zeros, optimizer)
    return {key: value.fill_(NEW_STATE.get(key.rpartition("/")[2], 0)) for key, value in state.items()}
