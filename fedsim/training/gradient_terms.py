"""What the methods of a run add to the gradients of local steps, before the optimizer takes them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from strategies.method import Terms

Tensors = Mapping[str, Tensor]  # by the names of the parameters, and shaped like them


class GradientTerms:
    """The `terms` of gradients of `parameters`: in each round `begin`, then `add` in every step, then `end`.

    Each value is treated by itself, so that the parameters may be those of one model or of a stacked network. Static
    tensors are read and written without synchronizing, so that a CUDA graph can capture `add`.
    """

    def __init__(self, parameters: Tensors, terms: Terms) -> None:
        self._names, self._parameters, self._terms = list(parameters), list(parameters.values()), terms
        self._constant = self._zeros(terms.constant)
        self._start = self._zeros(terms.pull != 0)
        self._sums = self._zeros(terms.mean_gradient)

    def _zeros(self, needed: bool) -> list[Tensor]:
        return [torch.zeros_like(parameter) for parameter in self._parameters] if needed else []

    @torch.no_grad()
    def begin(self, constant: Tensors) -> None:
        """Begin a round, with the parameters where its steps begin, and the constant term of each."""
        if self._constant:
            torch._foreach_copy_(self._constant, [constant[name] for name in self._names])
        if self._start:
            torch._foreach_copy_(self._start, self._parameters)
        if self._sums:
            torch._foreach_zero_(self._sums)

    @torch.no_grad()
    def add(self) -> None:
        """Add the terms to every parameter's gradient, in place."""
        if self._sums:
            gradients, sums = self._with_gradients(self._sums)
            torch._foreach_add_(sums, gradients)
        if self._constant:
            torch._foreach_add_(*self._with_gradients(self._constant))
        if self._start:
            gradients, moved = self._with_gradients(list(torch._foreach_sub(self._parameters, self._start)))
            torch._foreach_add_(gradients, moved, alpha=self._terms.pull)

    @torch.no_grad()
    def end(self, steps: int) -> dict[str, Tensor]:
        """The mean of a round's gradients over its `steps`, without the terms; {} if it is not asked for."""
        if not self._sums:
            return {}
        return dict(zip(self._names, torch._foreach_div(self._sums, steps), strict=True))

    def _with_gradients(self, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients that are there, and the entries of `tensors` for them."""
        pairs = [(p.grad, t) for p, t in zip(self._parameters, tensors, strict=True) if p.grad is not None]
        return [gradient for gradient, _ in pairs], [tensor for _, tensor in pairs]


def gradient_terms(parameters: Tensors, terms: Terms) -> GradientTerms | None:
    """`GradientTerms`; None where there are none."""
    return GradientTerms(parameters, terms) if any(terms) else None
