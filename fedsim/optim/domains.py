"""Which values an optimizer's state may have: from other ones no step can be taken, or only a wrong one."""

from __future__ import annotations

import math

from strategies.momentum import SECOND_MOMENTS

# Entries of the states of all optimizers here. Averages of gradients and of steps have either sign
SIGNED = ("exp_avg", "grad_avg", "momentum_buffer")


def state_range(entry: str, steps: int) -> tuple[float, float]:
    """The least and the largest value of an entry, for instance exp_avg_sq, after so many steps."""
    if entry == "step":
        return 0, steps
    if entry == "mu_product":  # of NAdam: the product of the momenta of all steps
        return 0, 1
    return (0, math.inf) if entry in SECOND_MOMENTS else (-math.inf, math.inf)
