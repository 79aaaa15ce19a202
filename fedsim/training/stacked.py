"""The rounds of K workers at once on one device, each worker's arithmetic its own.

With `WAY` = groups or products their replicas are side by side in one network: convolutions run as the groups of one,
or as batched products over patches (`models.Conv2d`), and fully connected layers as one batched product; BN and
pooling treat channels apart anyway. LARS and LAMB see each replica's part of a stacked parameter as a parameter of its
own, so that norms stay the workers' own; SGDM, which treats each value apart, sees the stacked one. With streams each
worker has a replica, and on a GPU a CUDA graph and a stream, of its own. All are `local_round.take_round`, up to the
rounding of the kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedsim.config import Config
from fedsim.data.datasets import classes_of, load_dataset
from fedsim.device import prepare
from fedsim.models import blank_model, convolve_by_products
from fedsim.optim import build_optimizer, load_optimizer_state, optimizer_state
from fedsim.training.cuda_graph import CapturedSteps, capturable
from fedsim.training.local_round import (
    End,
    Replica,
    Start,
    build_replica,
    local_plan,
    round_inputs,
    train_replica,
)

Way = Literal["groups", "products", "streams"]

WAY: Way = "groups"  # the fastest on a CPU; on a GPU not measured yet, `run.py bench` does


@dataclass
class Fleet:
    """K replicas side by side: the network, its parts by replica and name, and an optimizer that knows their states."""

    model: nn.Module
    parts: list[dict[str, Tensor]]  # of parameters, each with a part of the stacked gradient as its .grad
    buffers: list[dict[str, Tensor]]
    optimizer: Optimizer
    steps: CapturedSteps


def take_rounds(config: Config, starts: Sequence[Start]) -> list[End]:
    """The local steps of all workers in `starts`, which are in the same round."""
    return _on_streams(config, starts) if WAY == "streams" else _side_by_side(config, starts)


def _side_by_side(config: Config, starts: Sequence[Start]) -> list[End]:
    fleet = build_fleet(config, len(starts), WAY)
    tensors = [{**parts, **buffers} for parts, buffers in zip(fleet.parts, fleet.buffers, strict=True)]
    weights = [{name: start.weights[name] for name in of} for of, start in zip(tensors, starts, strict=True)]
    _fill(_named(tensors).values(), _named(weights).values())
    load_optimizer_state(_named(fleet.parts), fleet.optimizer, _named([start.state for start in starts]))
    losses = fleet.steps.run([round_inputs(config, start) for start in starts]).tolist()
    samples = local_plan(config).samples(starts[0].round)
    return [
        End(_copies(of), optimizer_state(parts, fleet.optimizer), loss, samples)
        for of, parts, loss in zip(tensors, fleet.parts, losses, strict=True)
    ]


@functools.lru_cache(maxsize=1)
def build_fleet(config: Config, replicas: int, way: Way) -> Fleet:
    """A fleet whose values are not set; kept, so that it is built once for all rounds, each of which sets them."""
    prepare(config)
    model = blank_model(config.model, classes_of(config), config.device, config.precision, replicas=replicas)
    if way == "products":
        convolve_by_products(model)
    parts = _parts_with_gradients(model, replicas)
    buffers = [
        {name: _split(buffer, replicas)[replica] for name, buffer in model.named_buffers()}
        for replica in range(replicas)
    ]
    optimizer = _sgdm(config, model, parts) if config.optimizer == "sgdm" else build_optimizer(config, _named(parts))
    keys = (local_plan(config).max_steps * config.batch_size, config.batch_size, config.precision, replicas)
    steps = CapturedSteps(model, optimizer, load_dataset(config).train, *keys, capture=capturable(config))
    return Fleet(model, parts, buffers, optimizer, steps)


def _parts_with_gradients(model: nn.Module, replicas: int) -> list[dict[str, Tensor]]:
    """Each replica's parts of the parameters; their .grad are parts of the stacked ones, which stay where they are."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(replicas)]
    for name, parameter in model.named_parameters():
        parameter.grad = torch.zeros_like(parameter)
        pairs = zip(_split(parameter.detach(), replicas), _split(parameter.grad, replicas), strict=True)
        for of_replica, (part, of_gradient) in zip(parts, pairs, strict=True):
            part.grad = of_gradient
            of_replica[name] = part
    return parts


def _sgdm(config: Config, model: nn.Module, parts: Sequence[dict[str, Tensor]]) -> Optimizer:
    """SGDM over the stacked parameters, in which the parts' momenta are parts of the stacked ones."""
    named = dict(model.named_parameters())
    optimizer = build_optimizer(config, named)
    for name, parameter in named.items() if config.momentum else ():
        momentum = torch.zeros_like(parameter)
        optimizer.state[parameter]["momentum_buffer"] = momentum
        for of_replica, part in zip(parts, _split(momentum, len(parts)), strict=True):
            optimizer.state[of_replica[name]]["momentum_buffer"] = part
    return optimizer


def _on_streams(config: Config, starts: Sequence[Start]) -> list[End]:
    """Each worker on a replica of its own; on a GPU all at once, and the device is waited for when all are on it."""
    replicas, streams = _build_replicas(config, len(starts))
    ends = []
    for replica, stream, start in zip(replicas, streams, starts, strict=True):
        if stream:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):  # without one, as if this line were not here
            ends.append(train_replica(config, replica, start))
    for stream in filter(None, streams):
        torch.cuda.current_stream(stream.device).wait_stream(stream)
    samples = local_plan(config).samples(starts[0].round)
    return [End(weights, state, float(loss), samples) for weights, state, loss in ends]


@functools.lru_cache(maxsize=1)
def _build_replicas(config: Config, count: int) -> tuple[list[Replica], list[torch.cuda.Stream | None]]:
    replicas = [build_replica(config) for _ in range(count)]
    if not config.device.startswith("cuda"):
        return replicas, [None] * count
    device = torch.device(config.device)
    return replicas, [torch.cuda.Stream(device) for _ in range(count)]  # type: ignore[no-untyped-call]


def _split(stacked: Tensor, replicas: int) -> list[Tensor]:
    """The replicas' parts of a stacked tensor, along its first dimension; a scalar is shared by all."""
    if stacked.ndim == 0:
        return [stacked] * replicas
    return list(stacked.view(replicas, -1, *stacked.shape[1:]).unbind(0))


def _named(of_replicas: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all replicas, as ``REPLICA/NAME``."""
    return {f"{replica}/{name}": tensor for replica, of in enumerate(of_replicas) for name, tensor in of.items()}


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    copies = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    _fill(copies.values(), tensors.values())
    return copies


def _fill(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Copy the values, those of one kind at once: a GPU would take a launch for each."""
    floats: tuple[list[Tensor], list[Tensor]] = ([], [])
    for tensor, value in zip(tensors, values, strict=True):
        if tensor.is_floating_point():
            floats[0].append(tensor)
            floats[1].append(value)
        else:
            tensor.copy_(value)
    torch._foreach_copy_(*floats)
