"""What LocalSGD with an outer optimizer must equal: large-batch SGD with momentum, Lookahead, FedAvg; in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from strategies.mean import mean
from strategies.method import State
from strategies.outer import outer_step
from tests.training.test_equalities import ROUNDS, WORKERS, Batch, data, network

Tensors = dict[str, Tensor]


def steps(model: nn.Module, optimizer: SGD, batches: list[Batch]) -> None:
    for inputs, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def local_sgd(outer: str, rounds: list[list[list[Batch]]], rate: float, **arguments: Any) -> Tensors:
    """The parameters after `rounds` of plain local SGD and the outer step."""
    model, state, step = network(), State(), outer_step(outer, **arguments)
    for workers in rounds:
        x = {name: value.detach() for name, value in model.named_parameters()}
        replicas = [copy.deepcopy(model) for _ in workers]
        for replica, batches in zip(replicas, workers, strict=True):
            steps(replica, SGD(replica.parameters(), lr=rate), batches)
        ends = [{name: value.detach() for name, value in replica.named_parameters()} for replica in replicas]
        x, state = step(x, mean(ends, [1 / len(ends)] * len(ends)), state, rate)
        model.load_state_dict(x)
    return dict(model.named_parameters())


def large_batch(rounds: list[list[list[Batch]]], **sgd: Any) -> Tensors:
    model = network()
    union = [tuple(torch.cat(parts) for parts in zip(*(w[0] for w in workers), strict=True)) for workers in rounds]
    steps(model, SGD(model.parameters(), **sgd), union)  # type: ignore[arg-type]
    return dict(model.named_parameters())


def distance(one: Tensors, other: Tensors) -> float:
    return max(float((one[name] - other[name]).detach().abs().max()) for name in one)


def test_slowmo_of_one_local_step_is_large_batch_heavy_ball() -> None:
    slowmo = local_sgd("slowmo", data(ROUNDS), 0.5, momentum=0.7)
    assert distance(slowmo, large_batch(data(ROUNDS), lr=0.5, momentum=0.7)) < 1e-14
    assert distance(slowmo, large_batch(data(ROUNDS), lr=0.5)) > 1e-2


def test_diloco_of_one_local_step_at_rate_1_is_large_batch_nesterov() -> None:
    diloco = local_sgd("diloco", data(ROUNDS), 1.0)
    assert distance(diloco, large_batch(data(ROUNDS), lr=0.7, momentum=0.9, nesterov=True)) < 1e-13
    assert distance(diloco, large_batch(data(ROUNDS), lr=0.7, momentum=0.9)) > 1e-2


def test_one_worker_with_outer_sgd_is_lookahead() -> None:
    """Zhang et al. 2019: after J fast steps the slow weights go the part alpha of the way."""
    alpha, rounds = 0.3, [workers[:1] for workers in data(ROUNDS, local_steps=4)]
    slow = network()
    for (batches,) in rounds:
        fast = copy.deepcopy(slow)
        steps(fast, SGD(fast.parameters(), lr=0.5), batches)
        with torch.no_grad():
            for s, f in zip(slow.parameters(), fast.parameters(), strict=True):
                s.lerp_(f, alpha)
    assert distance(local_sgd("sgd", rounds, 0.5, lr=alpha), dict(slow.named_parameters())) < 1e-14


@pytest.mark.parametrize("outer", ["fedadam", "fedyogi", "adam"])
def test_fedadam_of_beta1_zero_and_a_large_tau_is_averaging(outer: str) -> None:
    """x + eta m / (sqrt(v) + tau) goes to x + delta as eta = tau grows."""
    tau = 1e9
    arguments = {"lr": tau, "eps": tau, "betas": (0.0, 0.99)}
    rounds = data(ROUNDS, local_steps=3)
    assert distance(local_sgd(outer, rounds, 0.5, **arguments), local_sgd("none", rounds, 0.5)) < 1e-8


@pytest.mark.parametrize("outer", ["none", "slowmo", "diloco", "fedadam"])
def test_equal_workers_are_one_worker_bitwise(outer: str) -> None:
    alone = [workers[:1] for workers in data(ROUNDS, local_steps=3)]
    together = [workers * WORKERS for workers in alone]
    one, other = local_sgd(outer, alone, 0.5), local_sgd(outer, together, 0.5)
    assert all(torch.equal(one[name], other[name]) for name in one)
