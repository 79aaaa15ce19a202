"""The rounds of K workers as one: their replicas side by side in one network, stepping together.

Convolutions run as groups and fully connected layers as one batched product; BN and pooling treat channels apart
anyway. The optimizer sees each replica's part of every stacked parameter as a parameter of its own, so that
norms (LARS, LAMB) and states stay the workers' own. The arithmetic is that of the workers one by one,
`local_round.take_round`, up to the rounding of the other kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fedsim.config import Config
from fedsim.data import classes_of, training_images
from fedsim.local_round import End, Start, dropout_stream, local_batches
from fedsim.machine import prepare
from fedsim.models import blank_model, set_dropout_streams
from fedsim.optim import build_optimizer, load_optimizer_state, optimizer_state, set_lr
from fedsim.precision import parameter_dtype, products_in
from fedsim.sync import plan


@dataclass
class Fleet:
    """K replicas side by side: the network, its parts by replica and name, and one optimizer over all parts."""

    model: nn.Module
    gradients: list[Tensor]  # stacked, of all parameters
    parts: list[dict[str, Tensor]]  # of parameters, each with a part of the stacked gradient as its .grad
    buffers: list[dict[str, Tensor]]
    optimizer: Optimizer


def take_rounds(config: Config, starts: Sequence[Start]) -> list[End]:
    """The local steps of all workers in `starts`, which are in the same round."""
    fleet = build_fleet(config, len(starts))
    for parts, buffers, start in zip(fleet.parts, fleet.buffers, starts, strict=True):
        for name, part in {**parts, **buffers}.items():
            part.copy_(start.weights[name])
        load_optimizer_state(parts, fleet.optimizer, start.state)
    set_dropout_streams(fleet.model, [dropout_stream(config, start) for start in starts])
    losses = _take_steps(config, fleet, starts).tolist()
    samples = config.local_steps * config.batch_size
    return [
        End(_copies({**parts, **buffers}), optimizer_state(parts, fleet.optimizer), loss, samples)
        for parts, buffers, loss in zip(fleet.parts, fleet.buffers, losses, strict=True)
    ]


@functools.lru_cache(maxsize=1)
def build_fleet(config: Config, replicas: int) -> Fleet:
    """A fleet whose values are not set; kept, so that it is built once for all rounds, each of which sets them."""
    prepare(config)
    model = blank_model(config.model, classes_of(config), config.device, config.precision, replicas=replicas)
    gradients: list[Tensor] = []
    parts: list[dict[str, Tensor]] = [{} for _ in range(replicas)]
    for name, parameter in model.named_parameters():
        parameter.grad = gradient = torch.zeros_like(parameter)
        gradients.append(gradient)
        pairs = zip(_split(parameter.detach(), replicas), _split(gradient, replicas), strict=True)
        for of_replica, (part, of_gradient) in zip(parts, pairs, strict=True):
            part.grad = of_gradient
            of_replica[name] = part
    buffers = [
        {name: _split(buffer, replicas)[replica] for name, buffer in model.named_buffers()}
        for replica in range(replicas)
    ]
    named = {f"{replica}/{name}": part for replica, of in enumerate(parts) for name, part in of.items()}
    return Fleet(model, gradients, parts, buffers, build_optimizer(config, named))


def _take_steps(config: Config, fleet: Fleet, starts: Sequence[Start]) -> Tensor:
    """(K,) mean training losses over the round."""
    fleet.model.train()
    lr = plan(config, training_images(config)).lr
    device, dtype = torch.device(config.device), parameter_dtype(config.precision)
    losses = []
    streams = zip(*(local_batches(config, start) for start in starts), strict=True)
    for step, batches in enumerate(streams, starts[0].round * config.local_steps):
        set_lr(fleet.optimizer, lr(step))
        torch._foreach_zero_(fleet.gradients)
        images = torch.cat([images for images, _ in batches], dim=1).to(dtype)  # (B, K * 3, 32, 32)
        labels = torch.cat([labels for _, labels in batches])
        with products_in(config.precision, device):
            logits = fleet.model(images).view(len(labels), -1)  # (K, B, classes) flattened
            loss = F.cross_entropy(logits, labels, reduction="none").view(len(starts), -1).mean(1)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        fleet.optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses).mean(0)


def _split(stacked: Tensor, replicas: int) -> list[Tensor]:
    """The replicas' parts of a stacked tensor, along its first dimension; a scalar is shared by all."""
    if stacked.ndim == 0:
        return [stacked] * replicas
    return list(stacked.view(replicas, -1, *stacked.shape[1:]).unbind(0))


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}
