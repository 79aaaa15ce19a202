"""FedDyn (Acar, Zhao, Matas Navarro, Mattina, Whatmough and Saligrama, ICLR 2021), as in the authors' code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from strategies.arguments import above
from strategies.method import Method, ServerRound, State, Tensors, WorkerRound, Zeros, minus, zeros_like


@dataclass(frozen=True)
class FedDyn(Method):
    """Each worker's loss is changed so that its minimum agrees with the global one.

    alpha (y - x) - h_k is added to the gradient, and h_k becomes h_k - alpha (y_k - x). The server keeps h, the mean of
    all h_k, and the next x is the mean of the y_k minus h / alpha.
    """

    alpha: Annotated[float, above(0)] = 0.01
    constant = True
    needs = ("mean-is-next", "equal-shares", "no-delay")

    @property
    def pull(self) -> float:
        return self.alpha

    def keeps(self, zero: Zeros) -> Tensors:
        return zero.parameters

    def needs_all_memories(self, everyone: bool) -> bool:
        """h holds the h_k of every worker."""
        return True

    def begin(self, r: WorkerRound, own: Tensors, received: Tensors) -> None:
        r.add_to_gradients({name: -h for name, h in (own or zeros_like(r.begun)).items()})

    def end(self, r: WorkerRound, own: Tensors, received: Tensors) -> tuple[Tensors, Tensors]:
        moved = minus(r.y, r.start)
        return {}, {name: h - self.alpha * moved[name] for name, h in (own or zeros_like(moved)).items()}

    def update(self, r: ServerRound, state: State, mean: Tensors) -> State:
        moved = minus(r.next_x, r.x)
        state = {name: h - self.alpha * r.share * moved[name] for name, h in (state or zeros_like(r.x)).items()}
        r.next_x = {name: y - state[name] / self.alpha for name, y in r.next_x.items()}
        return state
