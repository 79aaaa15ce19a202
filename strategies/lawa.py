"""The mean of the server's last models (LAWA: Kaddour 2022, "Stop Wasting My Time!"), tested in place of the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from strategies.arguments import at_least, at_most
from strategies.mean import mean
from strategies.method import Method, ServerRound, State, Tensors
from strategies.sections import under_prefix, with_prefix


@dataclass(frozen=True)
class Lawa(Method):
    """The mean of the last `models`, of those after each `every` rounds; before there is one, the model itself."""

    models: Annotated[int, at_least(1), at_most(100)] = 5
    every: Annotated[int, at_least(1)] = 1

    def update(self, r: ServerRound, state: State, mean: Tensors) -> State:
        if r.round % self.every:
            return state
        return {**state, **with_prefix(f"{r.round // self.every % self.models}/", r.next_x)}

    def model_for_test(self, x: Tensors, state: State) -> Tensors:
        held = [under_prefix(f"{place}/", state) for place in range(self.models) if f"{place}/{next(iter(x))}" in state]
        return mean(held, [1 / len(held)] * len(held)) if held else x
