"""An exponential moving average of the server's models, which is tested in place of the last one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from strategies.arguments import at_least, below
from strategies.method import Method, ServerRound, State, Tensors


@dataclass(frozen=True)
class Ema(Method):
    """After each round a <- decay a + (1 - decay) x, as `torch.optim.swa_utils.get_ema_avg_fn`; it begins as x."""

    decay: Annotated[float, at_least(0), below(1)] = 0.99

    def update(self, r: ServerRound, state: State, mean: Tensors) -> State:
        if not state:
            return dict(r.next_x)
        return {name: self.decay * state[name] + (1 - self.decay) * x for name, x in r.next_x.items()}

    def model_for_test(self, x: Tensors, state: State) -> Tensors:
        return dict(state) if state else x
