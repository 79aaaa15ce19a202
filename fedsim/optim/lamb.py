"""LAMB: Adam in which each layer's step is proportional to the norm of its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fedsim.optim._foreach import Group, LayerwiseOptimizer, norms, require_nonnegative, zeros_for

BIAS_CORRECTIONS = ("none", "step-size", "moments")


class LAMB(LayerwiseOptimizer):
    r"""Layer-wise adaptive moments for batch training (You et al. 2020, arXiv 1904.00962), multi-tensor.

    For each parameter w with gradient g at step t, ``betas`` b1 and b2, and ``weight_decay`` d::

        m = b1 m + (1 - b1) g
        v = b2 v + (1 - b2) g^2
        u = m / (sqrt(v) + eps) + d w
        r = min(||w||, clamp_value) / ||u||      the trust ratio; 1 where either norm is 0
        w = w - lr r u

    The defaults are torch-optimizer's Lamb. With ``bias_correction="moments"`` and ``clamp_value=None`` it is Algorithm
    2 of the paper; with ``adapt_undecayed=False`` too, it is timm's without gradient clipping.

    Args:
        params: parameters, or parameter groups, which may override any of these arguments.
        lr: the global rate, at least 0; a float or a 0-dim tensor.
        betas: b1 and b2, in [0, 1).
        eps: added to the root of v.
        weight_decay: d, added to the Adam step before its norm is taken.
        bias_correction: "none"; "step-size", which multiplies the rate by sqrt(1 - b2^t) / (1 - b1^t), after
            the ratio (torch-optimizer's ``debias``); or the paper's "moments", m / (1 - b1^t) and v / (1 - b2^t),
            before it.
        clamp_value: the paper's phi: the largest weight norm used in the ratio; None or inf: no clamp.
        adapt_undecayed: False: r = 1 in groups without weight decay.

    Pitfalls:
        Without bias correction the bias cancels in r, but not where r = 1: the first step of a bias initialized to zero
        is (1 - b1) / sqrt(1 - b2) = 3.2 times the rate.
        The default clamp of 10 is active on wide layers from the first step: a fully connected layer of 1.6 M weights
        has norm 11.
        An undecayed parameter with r moves by lr ||w|| however small its gradient is, even if that is rounding noise,
        as for a convolution's bias before BN.
        A step can be captured in a CUDA graph after one outside it, which creates the state. The graph fixes a float
        ``lr``; a tensor ``lr`` on the parameters' device can be changed in place.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        bias_correction: str = "none",
        clamp_value: float | None = 10.0,
        adapt_undecayed: bool = True,
    ) -> None:
        require_nonnegative(lr=lr, eps=eps, weight_decay=weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"invalid betas: each must be in [0, 1), not {betas}")
        if bias_correction not in BIAS_CORRECTIONS:
            raise ValueError(f"invalid bias_correction: one of {', '.join(BIAS_CORRECTIONS)}, not {bias_correction}")
        if clamp_value is not None:
            require_nonnegative(clamp_value=clamp_value)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "clamp_value": clamp_value,
            "adapt_undecayed": adapt_undecayed,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Move step counts to the device of their parameter. `load_state_dict` calls this too."""
        super().__setstate__(state)
        for parameter, entries in self.state.items():
            if "step" in entries:
                entries["step"] = torch.as_tensor(entries["step"], dtype=torch.float32, device=parameter.device)

    def _update(self, params: list[Tensor], grads: list[Tensor], group: Group) -> None:
        for p in params:
            if not self.state[p]:
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p].update(step=step, exp_avg=zeros_for(p), exp_avg_sq=zeros_for(p))
        steps, m, v = ([self.state[p][entry] for p in params] for entry in ("step", "exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)

        updates = _adam_directions(m, v, steps, group)
        if group["weight_decay"] != 0:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        sizes = _trust_ratios(params, updates, group) * group["lr"]
        if group["bias_correction"] == "step-size":
            correction1, correction2 = _bias_corrections(steps, group)
            sizes = sizes * correction2.sqrt() / correction1
        torch._foreach_mul_(updates, sizes.unbind())
        torch._foreach_sub_(params, updates)


def _adam_directions(m: list[Tensor], v: list[Tensor], steps: list[Tensor], group: Group) -> list[Tensor]:
    """m / (sqrt(v) + eps), with corrected moments if ``bias_correction`` is "moments"; shaped like the parameters."""
    denominators = torch._foreach_sqrt(v)
    if group["bias_correction"] == "moments":
        # both corrections in the denominator, which saves a pass: c1 (sqrt(v / c2) + eps)
        correction1, correction2 = _bias_corrections(steps, group)
        torch._foreach_mul_(denominators, (correction1 / correction2.sqrt()).unbind())
        torch._foreach_add_(denominators, (correction1 * group["eps"]).unbind())
    else:
        torch._foreach_add_(denominators, group["eps"])
    return list(torch._foreach_div(m, denominators))


def _bias_corrections(steps: list[Tensor], group: Group) -> tuple[Tensor, Tensor]:
    """(N,) 1 - b1^t and (N,) 1 - b2^t, in float64: in float32 the relative error of the second is 1e-5 at t = 1."""
    beta1, beta2 = group["betas"]
    counts = torch.stack(steps).double()
    return 1 - beta1**counts, 1 - beta2**counts


def _trust_ratios(params: list[Tensor], updates: list[Tensor], group: Group) -> Tensor:
    """(N,) trust ratios r; 1 where either norm is 0."""
    if group["weight_decay"] == 0 and not group["adapt_undecayed"]:
        return torch.ones(len(params), dtype=params[0].dtype, device=params[0].device)
    weight, update = norms(params), norms(updates)
    if group["clamp_value"] is not None:
        weight = weight.clamp(max=group["clamp_value"])
    return (weight / update).masked_fill_((weight == 0) | (update == 0), 1)
