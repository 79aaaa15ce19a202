"""FedProx (Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith, MLSys 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from strategies.arguments import at_least
from strategies.method import Method


@dataclass(frozen=True)
class FedProx(Method):
    """The gradient of mu / 2 ||y - x||^2 is added to that of the loss: it pulls y towards x, where the round began."""

    mu: Annotated[float, at_least(0)] = 0.01

    @property
    def pull(self) -> float:
        return self.mu
