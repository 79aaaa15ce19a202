"""The server's half of a round of LocalSGD on tensors: what is sent, and what becomes of what the workers sent."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch

from strategies.layers import Layers
from strategies.mean import MEAN, Mean
from strategies.method import ServerRound, State, Tensors, minus, zeros_like
from strategies.sections import Sections, beside, under_prefix
from strategies.wire import WIRE, broadcast


class Sent(NamedTuple):
    """What the server sends to the workers of a round, and what all that is made of is compared with later."""

    model: Sections  # the global parameters and buffers before the round
    begun: Tensors  # the parameters that the workers begin from
    change: Tensors | None  # for the workers that hold the last parameters, what they are sent of these; None: all
    layers: dict[int, Tensors]  # what each worker is sent besides
    wire: State  # the wire's state after the round


def send(layers: Layers, r: ServerRound, buffers: Tensors, state: State, workers: Collection[int]) -> Sent:
    """What is sent to `workers` in a round that begins at the parameters of `r`."""
    change: Tensors | None = None
    wire: State = {}
    if layers.keeps_model:
        held, names = beside(r.x, state.get(WIRE, {})), layers.down(r.round, r.x)
        r.begun, change, wire = broadcast(layers.wire.down, r.x, held, layers.wire.seed(r.round, None), names)
    of_workers = {worker: layers.send(r, state, worker) for worker in workers}
    return Sent(Sections(r.x, buffers, {}), r.begun, change, of_workers, wire)


def update(layers: Layers, mean: Mean, r: ServerRound, sent: Sent, state: State) -> State:
    """The state of all layers, and of the mean, after a round; `r` then holds the next parameters and buffers.

    `r` holds the updates of the workers that are averaged, all on the device of `r.x`.
    """
    updates = list(r.updates.values())
    x, begun = layers.up(r.round, r.x), layers.up(r.round, r.begun)
    origin = zeros_like(begun) if r.encoded else begun
    average, remembered = mean.of_models(r, origin, state.get(MEAN, {}))
    if r.encoded:
        average = minus(x, average)
    elif layers.wire.down:  # the mean update, applied to the model that it was encoded from
        average = minus(x, minus(begun, average))
    r.next_x = {**r.x, **average}
    r.buffers = mean(sent.model.buffers, [each.buffers for each in updates], r.weights)
    received = beside(r.x, sent.layers[next(iter(r.updates))])

    def mean_reply(name: str) -> Tensors:
        replies = [each.layers[name] for each in updates]
        was_sent = under_prefix(f"{name}/", received)
        origin = {key: was_sent[key] if key in was_sent else torch.zeros_like(t) for key, t in replies[0].items()}
        return mean(origin, replies, r.weights) if origin else {}

    of_layers = {name: beside(r.x, of) for name, of in state.items() if name not in (WIRE, MEAN)}
    return layers.update(r, of_layers, mean_reply) | ({MEAN: remembered} if remembered else {})
