"""Outer optimizers: what the server does with the mean of the workers' models.

With x the model that a round began from and ȳ the mean of what the workers sent, Δ = x - ȳ is the pseudo-gradient
(Reddi et al. 2021). The methods in `SENTENCES`, and any `torch.optim` optimizer, can step on it.

It is a layer of the server alone, whose state is the optimizer's, a flat dict of tensors and numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.optim import Optimizer

from strategies.arguments import arguments_of
from strategies.errors import StrategyFailed
from strategies.fedopt import FedAdam, FedYogi
from strategies.method import Method, ServerRound, State, Tensors

NEED_MORE_THAN_GRADIENTS = ("LBFGS", "SparseAdam", "Muon", "Optimizer")  # a closure, sparse gradients, matrices alone
OPTIMIZERS: dict[str, type[Optimizer]] = {
    **{
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and name not in NEED_MORE_THAN_GRADIENTS
    },
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
}
OF_THE_IMPLEMENTATION = ("params", "foreach", "fused", "capturable", "differentiable")  # no arguments of the method
ADAPTIVE = {"betas": (0.9, 0.99), "eps": 1e-3}
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "fedavgm": ("sgd", {"lr": 1.0, "momentum": 0.9}),
    "slowmo": ("sgd", {"lr": 1.0, "momentum": 0.5}),
    "diloco": ("sgd", {"lr": 0.7, "momentum": 0.9, "nesterov": True}),
    "noloco": ("sgd", {"lr": 0.7, "momentum": 0.5}),
    "fedadam": ("fedadam", {"lr": 0.1, **ADAPTIVE}),
    "fedyogi": ("fedyogi", {"lr": 0.01, **ADAPTIVE}),
    "fedadagrad": ("adagrad", {"lr": 0.1, "eps": 1e-3}),
}
SENTENCES = {
    "fedavgm": "SGD with momentum (Hsu et al. 2019).",
    "slowmo": "SGD with momentum on Δ / lr, its rate in units of the workers' lr (Wang et al. 2020).",
    "diloco": "SGD with Nesterov momentum (Douillard et al. 2023).",
    "noloco": "SGD with momentum, of each worker from its own model with topology = pairs (Kolehmainen et al. 2025).",
    "fedadam": "Adam (Reddi et al. 2021), without bias correction unless it is asked for.",
    "fedyogi": "Yogi (Reddi et al. 2021), without bias correction unless it is asked for.",
    "fedadagrad": "Adagrad (Reddi et al. 2021).",
}
OUTER = ("none", *PRESETS, *sorted({*OPTIMIZERS, "yogi"} - PRESETS.keys()))  # the names that `outer_step` knows


@dataclass(frozen=True)
class OuterStep(Method):
    """An optimizer class with its arguments, by default those that take the mean itself.

    With `per_lr` the pseudo-gradient is divided by the workers' learning rate, and the step multiplied by it.
    """

    optimizer: type[Optimizer] = torch.optim.SGD
    arguments: Mapping[str, Any] = field(default_factory=lambda: {"lr": 1.0})
    per_lr: bool = False

    one_model = False
    reads_x = True

    @property
    def is_identity(self) -> bool:
        """Whether the step is x - 1 * (x - mean), which is the mean itself, but for rounding."""
        switched_on = {name: value for name, value in self.arguments.items() if value}
        return self.optimizer is torch.optim.SGD and switched_on == {"lr": 1.0}

    def update(self, r: ServerRound, state: State, mean: Tensors) -> State:
        """Step from x on the mean of the workers' parameters."""
        r.next_x, state = self(r.x, r.next_x, state, r.lr)
        return state

    def __call__(
        self, x: Mapping[str, Tensor], mean: Mapping[str, Tensor], state: State, lr: float
    ) -> tuple[Tensors, State]:
        """The next global parameters and the next state, after a round that ended at the local learning rate `lr`.

        Neither `x`, `mean` nor `state` is changed. SlowMo's Δ / lr has no value where `lr` is 0 (the workers have not
        moved): the mean is taken and the momentum kept. Raises StrategyFailed for the state of another optimizer.
        """
        if self.is_identity or (self.per_lr and lr == 0):
            return dict(mean), state
        parameters = {name: value.detach().clone() for name, value in x.items()}
        scale = lr if self.per_lr else 1
        for name, parameter in parameters.items():
            parameter.grad = (x[name] - mean[name]).div_(scale)
        optimizer = self.optimizer(parameters.values(), **{**self.arguments, "lr": self.arguments["lr"] * scale})
        _load(optimizer, parameters, state)
        optimizer.step()
        following = _state_of(optimizer, parameters)
        if state and state.keys() != following.keys():
            raise StrategyFailed("the server's state is of another optimizer: give --rerun to run it again")
        return parameters, following


def outer_step(name: str, **arguments: Any) -> OuterStep:
    """The outer step `name`, one of `OUTER`, with `arguments` over its defaults; raises ValueError for wrong ones."""
    if name not in OUTER:
        raise ValueError(f"{name} is unknown: it must be one of {', '.join(OUTER)}")
    if name == "none":
        if arguments:
            raise ValueError(f"none takes no arguments, but {', '.join(arguments)} was given")
        return OuterStep()
    base, defaults = PRESETS.get(name, (name, {"lr": 1.0}))
    known = arguments_of(STEPS[name])
    for argument, value in arguments.items():
        if argument not in known:
            raise ValueError(f"{name} has no argument {argument}: it must be one of {', '.join(known)}")
        known[argument].checked(value)
    step = OuterStep(_optimizer_class(base), {**defaults, **arguments}, per_lr=name == "slowmo")
    zero = {"": torch.zeros(1)}
    try:
        after, _ = step(zero, zero, {}, 1.0)
    except Exception as error:  # an argument that the optimizer refuses, or fails on
        raise ValueError(f"{name}: {str(error).splitlines()[0]}") from error
    if not after[""].isfinite():
        raise ValueError(f"{name} divides zero by zero where no worker has moved: give an eps above 0")
    return step


def _optimizer_class(name: str) -> type[Optimizer]:
    if name == "yogi":
        import torch_optimizer

        yogi: type[Optimizer] = torch_optimizer.Yogi
        return yogi
    return OPTIMIZERS[name]


def _step_of(name: str) -> Callable[..., OuterStep]:
    """`outer_step` of this name, with the arguments of its optimizer and the defaults of the method."""
    base, defaults = PRESETS.get(name, (name, {"lr": 1.0}))
    optimizer = _optimizer_class(base)
    hints = get_type_hints(optimizer.__init__)

    def step(**arguments: Any) -> OuterStep:
        return outer_step(name, **arguments)

    step.__name__ = name
    step.__doc__ = SENTENCES.get(name, f"A step of `{optimizer.__module__.partition('.')[0]}`'s {optimizer.__name__}.")
    step.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            each.replace(default=defaults.get(each.name, each.default), annotation=hints.get(each.name, Any))
            for each in inspect.signature(optimizer).parameters.values()
            if each.name not in OF_THE_IMPLEMENTATION
        ]
    )
    return step


def _state_of(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> State:
    """The state of `optimizer`: ``PARAMETER/ENTRY`` -> a tensor or a number."""
    return {
        f"{name}/{entry}": value
        for name, parameter in parameters.items()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def _load(optimizer: Optimizer, parameters: Mapping[str, Tensor], state: State) -> None:
    """Load copies of `state` into `optimizer`; torch expects step counts on the CPU."""
    for key, value in state.items():
        name, _, entry = key.rpartition("/")
        if isinstance(value, Tensor):
            value = value.cpu().clone() if entry == "step" else value.clone()
        optimizer.state[parameters[name]][entry] = value


STEPS: Mapping[str, Callable[..., OuterStep]] = {name: _step_of(name) for name in OUTER if name != "none"}
