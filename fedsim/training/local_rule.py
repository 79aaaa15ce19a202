"""Local rules: what is added to the gradients of a worker's local steps, before its optimizer takes them.

    fedprox     mu (y - x): it pulls y towards x, where the round began (Li et al. 2020)
    scaffold    c - c_k: the mean of all workers' gradients minus this worker's, both of earlier rounds
                (Karimireddy et al. 2020); with scaffold-inferred each client infers it from the models that it gets

Each treats every value by itself, so that the parameters may be those of one model or of a stacked network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedsim.config import Config, check_used, kebab
from fedsim.errors import UserError

Tensors = Mapping[str, Tensor]  # by the names of the parameters, and shaped like them
USED_BY = {"prox_mu": ("fedprox",)}  # key -> the rules that use it
INFERRED_NEEDS: dict[str, tuple[Any, ...]] = {  # key -> its values with which clients can infer SCAFFOLD's correction
    # How far a model moved must be the sum of its corrected gradients times their rates
    "optimizer": ("sgdm",),
    "momentum": (0.0,),
    "weight_decay": (0.0,),
    # The model that a client gets must be the exact mean of what all clients hold, after as many steps each
    "local_epochs": (0,),
    "fraction": (1.0,),
    "outer": ("none",),
    "compress": ("none",),
    "compress_down": ("none",),
}


class LocalRule(ABC):
    """A rule over `parameters`: in each round `begin`, then `correct_gradients` in every step, then `end`.

    It reads and writes static tensors without synchronizing, so that a CUDA graph can capture `correct_gradients`.
    """

    def __init__(self, parameters: Tensors) -> None:
        self._names, self._parameters = list(parameters), list(parameters.values())

    @abstractmethod
    def begin(self, correction: Tensors) -> None:
        """Begin a round, with the parameters at their first values; only SCAFFOLD has a `correction`."""

    @abstractmethod
    def correct_gradients(self) -> None:
        """Change every parameter's gradient in place."""

    def end(self, steps: int) -> dict[str, Tensor]:
        """End a round of so many steps: the mean of its gradients as they were before the rule, if the rule has it."""
        return {}

    def _with_gradients(self, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients that are there, and the entries of `tensors` for them."""
        pairs = [(p.grad, t) for p, t in zip(self._parameters, tensors, strict=True) if p.grad is not None]
        return [gradient for gradient, _ in pairs], [tensor for _, tensor in pairs]


class FedProx(LocalRule):
    """Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith, MLSys 2020: the gradient of mu / 2 ||y - x||^2."""

    def __init__(self, parameters: Tensors, mu: float) -> None:
        super().__init__(parameters)
        self._mu = mu
        self._x = [torch.zeros_like(parameter) for parameter in self._parameters]

    @torch.no_grad()
    def begin(self, correction: Tensors) -> None:
        torch._foreach_copy_(self._x, self._parameters)

    @torch.no_grad()
    def correct_gradients(self) -> None:
        gradients, moved = self._with_gradients(list(torch._foreach_sub(self._parameters, self._x)))
        torch._foreach_add_(gradients, moved, alpha=self._mu)


class ScaffoldInferred(LocalRule):
    """A correction of every gradient in a round; see `inferred_correction`."""

    def __init__(self, parameters: Tensors) -> None:
        super().__init__(parameters)
        self._correction = [torch.zeros_like(parameter) for parameter in self._parameters]

    @torch.no_grad()
    def begin(self, correction: Tensors) -> None:
        torch._foreach_copy_(self._correction, [correction[name] for name in self._names])

    @torch.no_grad()
    def correct_gradients(self) -> None:
        torch._foreach_add_(*self._with_gradients(self._correction))


class Scaffold(ScaffoldInferred):
    """Karimireddy, Kale, Mohri, Reddi, Stich and Suresh, ICML 2020, with the mean gradient of a round as c_k.

    For SGD at a constant rate, without momentum and weight decay, that mean is the paper's option II,
    c_k - c + (x - y) / (J lr).
    """

    def __init__(self, parameters: Tensors) -> None:
        super().__init__(parameters)
        self._sums = [torch.zeros_like(parameter) for parameter in self._parameters]

    @torch.no_grad()
    def begin(self, correction: Tensors) -> None:
        super().begin(correction)
        torch._foreach_zero_(self._sums)

    @torch.no_grad()
    def correct_gradients(self) -> None:
        gradients, sums = self._with_gradients(self._sums)
        torch._foreach_add_(sums, gradients)
        super().correct_gradients()

    @torch.no_grad()
    def end(self, steps: int) -> dict[str, Tensor]:
        return dict(zip(self._names, torch._foreach_div(self._sums, steps), strict=True))


def build_rule(config: Config, parameters: Tensors) -> LocalRule | None:
    """The rule of `config` over `parameters`; None where gradients stay as they are."""
    match config.local_rule:
        case "fedprox":
            return FedProx(parameters, config.prox_mu)
        case "scaffold":
            return Scaffold(parameters)
        case "scaffold-inferred":
            return ScaffoldInferred(parameters)
        case "none":
            return None


def check_local_rule(config: Config) -> None:
    """Raise UserError where the keys of the rule do not go together."""
    check_used(config, "local_rule", USED_BY)
    needs = {**INFERRED_NEEDS, "min_clients": (0, config.clients)} if config.local_rule == "scaffold-inferred" else {}
    for name, values in needs.items():
        if (value := getattr(config, name)) not in values:
            raise UserError(
                f"{kebab(name)} = {value}: local-rule = scaffold-inferred needs {kebab(name)} = {values[0]}: "
                "give that, or --local-rule scaffold"
            )
    if not config.local_rule.startswith("scaffold"):
        return
    zero = "does not keep the sum of SCAFFOLD's corrections at zero: give"
    if config.mean != "exact":
        raise UserError(f"mean = {config.mean} {zero} --mean exact, or another --local-rule")
    if config.strategy != "localsgd":
        raise UserError(
            f"strategy = {config.strategy} {zero} --strategy localsgd with an outer, or another --local-rule"
        )
    if config.clients_per_round < config.clients:
        # With unequal weights a client's share in c would change with who else is sampled
        if config.client_weights != "equal":
            raise UserError(
                f"client-weights = {config.client_weights} of a sample {zero} --client-weights equal, or all clients"
            )
        if config.local_epochs:
            raise UserError(f"local-epochs = {config.local_epochs} of a sample {zero} --local-steps, or all clients")


def control_variate(config: Config, c: Tensors, kept: Tensors) -> Tensors:
    """SCAFFOLD: a client's c_k, as it was `kept` after its last round.

    Before its first round it is zero. Where all clients take part in every round, only one that has lost its c_k can
    be without after the first, and begins again at c: without a correction.
    """
    if kept:
        return kept
    return c if config.clients_per_round == config.clients else {name: torch.zeros_like(c[name]) for name in c}


def correction_of(c: Tensors, c_k: Tensors) -> dict[str, Tensor]:
    """SCAFFOLD: c - c_k."""
    return {name: value - c_k[name].to(value.device) for name, value in c.items()}


def inferred_correction(correction: Tensors, y: Tensors, x: Tensors, rates: float) -> dict[str, Tensor]:
    """SCAFFOLD: a client's next c - c_k, inferred from the model `y` that it sent and the mean `x` of all.

    Plain SGD moved y by the mean gradient and the `correction` of its round times `rates`, the sum of the learning
    rates. So (y - x) / rates is the mean of all mean gradients minus its own, minus the correction, as those of all
    clients add up to zero.
    """
    if rates == 0:  # no model has moved
        return dict(correction)
    return {
        name: correction[name].to(mean.device) + (y[name].to(mean.device) - mean) / rates for name, mean in x.items()
    }


def control_message(config: Config, c: Tensors, c_k: Tensors, gradients: Tensors) -> dict[str, Tensor]:
    """SCAFFOLD: what a client sends after a round that began at c and c_k; the mean of all messages is the next c.

    `gradients` is its new c_k. Where not all clients take part, it sends c and the change of c_k.
    """
    if config.clients_per_round == config.clients:
        return dict(gradients)
    return {name: c[name].to(new.device) + (new - c_k[name].to(new.device)) for name, new in gradients.items()}
