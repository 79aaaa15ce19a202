"""Streaming DiLoCo (Douillard et al. 2025, arXiv 2501.18512): fragments of the model that are synchronized in turn.

A round then sends one fragment, so that the peak of the traffic falls by their number, and what becomes of it may
arrive some rounds later, while the workers go on. Workers begin where those of torchft begin.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from strategies.arguments import above, at_least, at_most, below
from strategies.method import Method, ServerRound, State, Tensors, WorkerRound, Zeros
from strategies.outer import outer_step


@dataclass(frozen=True)
class Streaming(Method):
    """Round r sends fragment p = r - 1 modulo the number of `fragments`, and SGD steps from x_p, as `diloco` does.

    `delay` rounds later a worker that has y_p by then goes on from `mix` y_p + (1 - `mix`) x_p; all other fragments are
    its own. A worker that has lost them, or whose update was left out, goes on from the model that it is sent.
    """

    fragments: Annotated[int, at_least(1)] = 4
    delay: Annotated[int, at_least(0)] = 1
    mix: Annotated[float, at_least(0), at_most(1)] = 0.5
    lr: Annotated[float, above(0)] = 0.7
    momentum: Annotated[float, at_least(0), below(1)] = 0.9
    nesterov: bool = True
    needs = ("all-clients",)
    reads_message = own_start = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delay >= self.fragments:
            raise ValueError(f"delay = {self.delay} is not below fragments = {self.fragments}: give a smaller one")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov = true needs a momentum above 0")

    @property
    def partial(self) -> bool:
        return self.fragments > 1

    @property
    def keeps_memory(self) -> bool:
        return self.partial or self.mix > 0

    @property
    def period(self) -> int:
        return self.fragments

    def down(self, round_: int, parameters: Tensors) -> Collection[str]:
        sent = round_ - 1 - self.delay  # the round that sent what now arrives
        return self.up(sent, parameters) if sent > 0 else ()

    def up(self, round_: int, parameters: Tensors) -> Collection[str]:
        return fragments_of(parameters, self.fragments)[(round_ - 1) % self.fragments]

    def keeps(self, zero: Zeros) -> Tensors:
        return zero.parameters if self.keeps_memory else {}

    def begin(self, r: WorkerRound, own: Tensors, received: Tensors) -> None:
        if own and r.continues:
            arrived = self.down(r.round, r.begun)
            r.start = {n: x.lerp(own[n], self.mix) if n in arrived else own[n] for n, x in r.begun.items()}

    def end(self, r: WorkerRound, own: Tensors, received: Tensors) -> tuple[Tensors, Tensors]:
        return {}, dict(r.y) if self.keeps_memory else {}

    def update(self, r: ServerRound, state: State, mean: Tensors) -> State:
        step = outer_step("diloco", lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)
        sent = self.up(r.round, r.x)
        of_fragment = {key: value for key, value in state.items() if key.rpartition("/")[0] in sent}
        x, y = ({name: all_[name] for name in r.x if name in sent} for all_ in (r.x, r.next_x))
        moved, following = step(x, y, of_fragment, r.lr)
        r.next_x = {**r.next_x, **moved}
        return {**state, **following}


def fragments_of(parameters: Mapping[str, Tensor], count: int) -> list[set[str]]:
    """The names of the parameters in `count` fragments of about the same size.

    The parameters of a layer stay together. The largest layer comes first, each to the smallest fragment so far. Raises
    ValueError where there are fewer layers.
    """
    layers: dict[str, list[str]] = {}
    for name in parameters:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    if len(layers) < count:
        raise ValueError(f"fragments = {count}: the model has {len(layers)} layers with parameters: give fewer")
    sizes = {layer: sum(parameters[name].numel() for name in names) for layer, names in layers.items()}
    held, fragments = [0] * count, [set[str]() for _ in range(count)]
    for layer in sorted(layers, key=lambda layer: (-sizes[layer], layer)):
        smallest = held.index(min(held))
        held[smallest] += sizes[layer]
        fragments[smallest].update(layers[layer])
    return fragments
