"""LocalSGD in plain PyTorch, as its papers write it (Stich 2019, Lin et al. 2020): read this first.

fedsim's engines do the same faster: in threads, as one stacked network, on Ray or on several machines. What its other
methods add to a round is in `strategies`, a file each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

Batch = Callable[[int, int], tuple[Tensor, Tensor]]  # of a worker and a local step: inputs and labels


def local_sgd(
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], Optimizer],
    batch: Batch,
    workers: int,
    local_steps: Sequence[int],
    momentum_at_sync: Literal["keep", "reset", "average"] = "keep",
) -> None:
    """Train `model` in place: in each round J = `local_steps[round]` steps on each of K `workers`, then their mean.

    `momentum_at_sync` says what becomes of the workers' optimizer states when their models are averaged. BatchNorm's
    running statistics are averaged as the parameters are.
    """
    replicas = [copy.deepcopy(model) for _ in range(workers)]
    optimizers = [make_optimizer(replica) for replica in replicas]
    first = 0  # local step, counted through all rounds
    for steps in local_steps:
        for worker, (replica, optimizer) in enumerate(zip(replicas, optimizers, strict=True)):
            replica.load_state_dict(model.state_dict())
            take_steps(replica, optimizer, batch, worker, range(first, first + steps))
        states = [replica.state_dict() for replica in replicas]
        model.load_state_dict({name: average([state[name] for state in states]) for name in states[0]})
        if momentum_at_sync == "reset":
            optimizers = [make_optimizer(replica) for replica in replicas]
        if momentum_at_sync == "average":
            average_states(optimizers)
        first += steps


def take_steps(model: nn.Module, optimizer: Optimizer, batch: Batch, worker: int, steps: range) -> None:
    """Take the local steps of a round on one worker."""
    model.train()
    for step in steps:
        inputs, labels = batch(worker, step)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def average(values: Sequence[Tensor]) -> Tensor:
    """The mean of equally shaped tensors, in float64; of integers (BatchNorm's counters) the largest."""
    stacked = torch.stack(list(values))
    return stacked.double().mean(0) if stacked.is_floating_point() else stacked.amax(0)


def average_states(optimizers: Sequence[Optimizer]) -> None:
    """Give every optimizer the mean of all their states, parameter by parameter."""
    groups = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    for parameters in zip(*groups, strict=True):
        states = [optimizer.state[p] for optimizer, p in zip(optimizers, parameters, strict=True)]
        for entry in states[0]:
            mean = average([state[entry] for state in states])
            for state in states:
                state[entry].copy_(mean)
