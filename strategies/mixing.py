"""The server's half of a round in which workers have models of their own: it holds them and mixes them by a topology.

Each model is treated as a server of its own: it has a state of the layers, and its round is one of LocalSGD with the
workers of a row. So `momentum-at-sync = average` and the rules for BatchNorm mean in a row what they mean for all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from strategies.averaging import Sent, send, update
from strategies.drift import vector_of
from strategies.layers import Layers
from strategies.mean import Mean, mean
from strategies.method import ServerRound, State, Tensors, minus
from strategies.sections import Sections, beside, join, split, with_prefix
from strategies.topology import Row

TOPOLOGY = "topology"  # the owner of the models in the server's state, each under its number
MODEL_OF = "model-of"  # the number of each worker's model, (workers,) int64


class Model(NamedTuple):
    """What workers begin a round from, and the state of the layers for them."""

    parameters: Tensors
    buffers: Tensors
    state: State


class Models(NamedTuple):
    """The models of all workers; those that are surely equal are held once."""

    of: Sequence[int]  # worker -> place in `each`
    each: Sequence[Model]

    @property
    def shares(self) -> list[float]:
        """The part of the workers that has each model."""
        return [self.of.count(place) / len(self.of) for place in range(len(self.each))]


def models_of(state: State, x: Tensors, buffers: Tensors, workers: int) -> Models:
    """The models in the server's `state`; before the first round all workers have the one given."""
    if TOPOLOGY not in state:
        return Models([0] * workers, [Model(x, buffers, state)])
    held: dict[str, Tensors] = {}
    for key, value in state[TOPOLOGY].items():
        place, _, name = key.partition("/")
        held.setdefault(place, {})[name] = value
    of = held.pop(MODEL_OF)[""].tolist()
    return Models(of, [_unpacked(held[str(place)]) for place in range(len(held))])


def as_state(models: Models) -> State:
    """What `models_of` reads."""
    held = {MODEL_OF: torch.tensor(models.of)}
    for place, model in enumerate(models.each):
        of_layers = {f"{name}/{key}": value for name, of in model.state.items() for key, value in of.items()}
        held |= with_prefix(f"{place}/", join(Sections(model.parameters, model.buffers, of_layers)))
    return held


def _unpacked(arrays: Tensors) -> Model:
    parameters, buffers, of_layers = split(arrays)
    state: dict[str, State] = {}
    for key, value in of_layers.items():
        name, _, entry = key.partition("/")
        state.setdefault(name, {})[entry] = value
    return Model(parameters, buffers, state)


class OwnModels(NamedTuple):
    """The models that workers have of their own in a round, what each worker is sent, and who averages whom."""

    models: Models
    sent: Mapping[int, Sent]
    rows: Sequence[Row]


def send_own(
    layers: Layers,
    round_at: Callable[[Tensors], ServerRound],
    models: Models,
    rows: Sequence[Row],
    workers: Collection[int],
) -> OwnModels:
    """What is sent to `workers`, each its own model, in a round that `round_at` makes for given parameters."""
    sent: dict[int, Sent] = {}
    for place, model in enumerate(models.each):
        having = [worker for worker in workers if models.of[worker] == place]
        sent |= dict.fromkeys(having, send(layers, round_at(model.parameters), model.buffers, model.state, having))
    return OwnModels(models, {worker: sent[worker] for worker in workers}, rows)


def mix(layers: Layers, average: Mean, r: ServerRound, own: OwnModels) -> Models:
    """The models after a round; `r` then holds the mean of all of them.

    Of a row, those are averaged whose updates are there, each by its weight in the row times that of its update; where
    there are none, the worker keeps the model that it has. Workers that average the same end with one model, unless a
    layer makes of the mean another for each model before the round (`reads_x`).
    """
    r.begins = {worker: beside(r.x, own.sent[worker].begun) for worker in r.updates}
    of: list[int] = []
    each: list[Model] = []
    places: dict[Hashable, int] = {}
    found: dict[int, dict[int, float]] = {}
    for worker, row in enumerate(own.rows):
        if id(row) not in found:  # all workers of a group share theirs
            found[id(row)] = {k: row[k] * update.weight for k, update in r.updates.items() if row.get(k)}
        weights = found[id(row)]
        begun = own.models.of[worker] if layers.reads_x or not weights else own.models.of[next(iter(weights))]
        key = begun, tuple(weights.items())
        if key not in places:
            places[key] = len(each)
            each.append(_averaged(layers, average, r, own, begun, weights) if weights else own.models.each[begun])
        of.append(places[key])
    after = Models(of, each)
    r.next_x = mean([beside(r.x, model.parameters) for model in each], after.shares)
    r.buffers = mean([beside(r.x, model.buffers) for model in each], after.shares)
    return after


def _averaged(
    layers: Layers, average: Mean, r: ServerRound, own: OwnModels, begun: int, weights: Mapping[int, float]
) -> Model:
    """What becomes of the model at place `begun`, with the updates of the workers with `weights`."""
    model = own.models.each[begun]
    x = beside(r.x, model.parameters)
    total = math.fsum(weights.values())
    updates = {worker: r.updates[worker] for worker in weights}
    alike = all(own.models.of[worker] == begun for worker in weights)
    if r.encoded and not alike:  # they are differences from other models
        updates = {k: sent._replace(parameters=minus(r.begins[k], sent.parameters)) for k, sent in updates.items()}
    of_row = dataclasses.replace(
        r,
        x=x,
        begun=x,
        updates=updates,
        encoded=r.encoded and alike,
        weights=[weight / total for weight in weights.values()],
        share=len(weights) / len(own.rows),
    )
    state = update(layers, average, of_row, own.sent[next(iter(weights))], model.state)
    return Model(of_row.next_x, of_row.buffers, state)


def consensus_distance(models: Models, x: Mapping[str, Tensor]) -> dict[str, float]:
    """`consensus-distance`: the root mean square over all workers of the distance of their models to the mean `x`."""
    distances = torch.stack([vector_of(minus(beside(x, model.parameters), x)).norm() for model in models.each])
    shares = torch.tensor(models.shares, dtype=torch.float64, device=distances.device)
    return {"consensus-distance": math.sqrt(float((shares * distances.square()).sum()))}
