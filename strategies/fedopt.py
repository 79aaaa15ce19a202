"""FedAdam and FedYogi as Reddi et al. 2021 write them (Algorithm 2), and with Kingma's bias correction.

PyTorch's Adam and torch-optimizer's Yogi have only the corrected form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class FedAdam(Optimizer):
    """m ← β₁ m + (1 - β₁) g; v ← β₂ v + (1 - β₂) g²; x ← x - lr m / (√v + eps), from m = v = 0.

    With `bias_correction`, the step of x uses m / (1 - β₁^t) and v / (1 - β₂^t) in place of m and v (Kingma and Ba
    2015). Raises ValueError for numbers out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-3,
        bias_correction: bool = False,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not eps >= 0:
            raise ValueError(f"Invalid eps: {eps}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Invalid betas: {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "bias_correction": bias_correction})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                gradient, state = parameter.grad, self.state[parameter]
                if "m" not in state:
                    state |= {"m": torch.zeros_like(parameter), "v": torch.zeros_like(parameter), "rounds": 0}
                state["rounds"] += 1
                m, v = state["m"], state["v"]
                m.mul_(beta1).add_(gradient, alpha=1 - beta1)
                self._accumulate(v, gradient.square(), beta2)
                if group["bias_correction"]:
                    m, v = m / (1 - beta1 ** state["rounds"]), v / (1 - beta2 ** state["rounds"])
                parameter.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-group["lr"])

    def _accumulate(self, v: Tensor, square: Tensor, beta: float) -> None:
        v.mul_(beta).add_(square, alpha=1 - beta)


class FedYogi(FedAdam):
    """FedAdam with v ← v - (1 - β₂) g² sign(v - g²)."""

    def _accumulate(self, v: Tensor, square: Tensor, beta: float) -> None:
        v.addcmul_(square, (v - square).sign_(), value=beta - 1)
