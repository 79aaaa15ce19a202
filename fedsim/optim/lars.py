"""LARS: momentum SGD in which each layer's step is proportional to the norm of its weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fedsim.optim._foreach import Group, LayerwiseOptimizer, norms, require_nonnegative, zeros_for


class LARS(LayerwiseOptimizer):
    r"""Layer-wise adaptive rate scaling (You, Gitman and Ginsburg 2017, arXiv 1708.03888), multi-tensor.

    For each parameter w with gradient g, d the ``weight_decay``, m the ``momentum`` and c the ``trust_coefficient``::

        r = c ||w|| / (||g|| + d ||w|| + eps)    the trust ratio; the paper's local rate
        v = m v + r (g + d w)
        w = w - lr v                             nesterov: lr (r (g + d w) + m v)

    This equals torch-optimizer's LARS and, where no gradient is all zero, timm's. As in torch's SGD, v does not contain
    the rate. In Algorithm 1 of the paper it does, so that v holds the rates of earlier steps; the two differ only where
    the rate varies. ``lr_in_momentum=True`` is that algorithm::

        v = m v + lr r (g + d w)
        w = w - v

    Args:
        params: parameters, or parameter groups, which may override any of these arguments.
        lr: the global rate, at least 0; a float or a 0-dim tensor.
        momentum: m; without it (0) there is no buffer.
        weight_decay: d, inside the ratio and scaled by it.
        nesterov: Nesterov momentum; needs a momentum.
        trust_coefficient: c, the size of a layer's step relative to its norm.
        eps: keeps the ratio finite.
        lr_in_momentum: the paper's Algorithm 1, see above.
        adapt_undecayed: use the trust ratio also in groups without weight decay.

    Pitfalls:
        A group with ``weight_decay=0`` has r = 1 unless ``adapt_undecayed``: biases and BN parameters in it use the
        global rate, which is large for LARS.
        A parameter of norm 0 has r = 1, so that it can leave zero; where the gradient is all zero, r = 0 and
        the weights do not decay either.
        A step can be captured in a CUDA graph after one outside it, which creates the buffers. The graph fixes a float
        ``lr``; a tensor ``lr`` on the parameters' device can be changed in place.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        lr_in_momentum: bool = False,
        adapt_undecayed: bool = False,
    ) -> None:
        require_nonnegative(lr=lr, momentum=momentum, weight_decay=weight_decay)
        require_nonnegative(trust_coefficient=trust_coefficient, eps=eps)
        if nesterov and momentum == 0:
            raise ValueError("nesterov needs a momentum")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "lr_in_momentum": lr_in_momentum,
            "adapt_undecayed": adapt_undecayed,
        }
        super().__init__(params, defaults)

    def _update(self, params: list[Tensor], grads: list[Tensor], group: Group) -> None:
        directions = _directions(params, grads, group)
        if group["momentum"] != 0:
            directions = self._with_momentum(params, directions, group)
        lr = group["lr"]
        if group["lr_in_momentum"]:
            torch._foreach_sub_(params, directions)
        elif isinstance(lr, Tensor):  # alpha would copy it to the host
            torch._foreach_sub_(params, torch._foreach_mul(directions, lr))
        else:
            torch._foreach_sub_(params, directions, alpha=lr)

    def _with_momentum(self, params: list[Tensor], directions: list[Tensor], group: Group) -> list[Tensor]:
        """Update v by the directions; returns v, or with Nesterov directions + m v."""
        new = [i for i, p in enumerate(params) if "momentum_buffer" not in self.state[p]]
        for i in new:
            self.state[params[i]]["momentum_buffer"] = zeros_for(params[i])
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, directions)
        for i in new:  # to the sign of a zero, as in torch.optim.SGD
            buffers[i].copy_(directions[i])
        if group["nesterov"]:
            return list(torch._foreach_add(directions, buffers, alpha=group["momentum"]))
        return buffers


def _directions(params: list[Tensor], grads: list[Tensor], group: Group) -> list[Tensor]:
    """What is added to v, shaped like `params`: r (g + d w), times the rate with ``lr_in_momentum``."""
    inner_lr = group["lr"] if group["lr_in_momentum"] else None
    if group["weight_decay"] == 0 and not group["adapt_undecayed"]:
        return grads if inner_lr is None else list(torch._foreach_mul(grads, inner_lr))
    ratios = _trust_ratios(params, grads, group)
    if inner_lr is not None:
        ratios = ratios * inner_lr
    directions = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
    torch._foreach_mul_(directions, ratios.unbind())
    return directions


def _trust_ratios(params: list[Tensor], grads: list[Tensor], group: Group) -> Tensor:
    """(N,) trust ratios r; 1 where the parameter is zero, 0 where the gradient is."""
    weight, gradient = norms(params), norms(grads)
    ratios: Tensor = group["trust_coefficient"] * weight / (gradient + group["weight_decay"] * weight + group["eps"])
    return ratios.masked_fill_(weight == 0, 1).masked_fill_(gradient == 0, 0)
