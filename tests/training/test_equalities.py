"""What LocalSGD must equal, and what it must not: in float64, by the real step and the real mean.

The models have no BN and no dropout unless a test says so; shards are equal and batches full.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedsim.config import Config
from fedsim.optim import build_optimizer, load_optimizer_state, optimizer_state, set_lr
from fedsim.tasks.classification import Classification
from fedsim.training.step import Learner, take_step
from strategies.mean import weighted_mean

Batch = tuple[Tensor, Tensor]
WORKERS, BATCH, ROUNDS = 4, 8, 6


def network(batchnorm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7), nn.BatchNorm1d(7) if batchnorm else nn.Identity(), nn.Tanh(), nn.Linear(7, 3)]
    return nn.Sequential(*layers).double()


def data(rounds: int, local_steps: int = 1) -> list[list[list[Batch]]]:
    """[round][worker][step] -> a batch."""
    generator = torch.Generator().manual_seed(1)

    def batch() -> Batch:
        x = torch.randn(BATCH, 5, generator=generator, dtype=torch.float64)
        return x, torch.randint(0, 3, (BATCH,), generator=generator)

    return [[[batch() for _ in range(local_steps)] for _ in range(WORKERS)] for _ in range(rounds)]


def mean(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The strategy's mean of the workers' float arrays; the first worker's integers."""
    weights = [1 / len(states)] * len(states)
    return {
        name: weighted_mean([state[name] for state in states], weights) if first.is_floating_point() else first
        for name, first in states[0].items()
    }


def run_steps(model: nn.Module, optimizer: Optimizer, batches: list[Batch], rates: list[float]) -> None:
    model.train()
    for (images, labels), lr in zip(batches, rates, strict=True):
        set_lr(optimizer, lr)
        take_step(Learner(model, optimizer, Classification(), "fp32"), (images, labels))


def local_sgd(model: nn.Module, config: Config, rounds: list[list[list[Batch]]]) -> dict[str, Tensor]:
    """LocalSGD as the paper writes it: every worker steps from the mean, then all are averaged."""
    glob = copy.deepcopy(model.state_dict())
    states: list[dict[str, Tensor]] = [{} for _ in range(WORKERS)]
    for round, workers in enumerate(rounds):
        replies = []
        for worker, batches in enumerate(workers):
            replica = copy.deepcopy(model)
            replica.load_state_dict(glob)
            named = dict(replica.named_parameters())
            optimizer = build_optimizer(config, named)
            load_optimizer_state(named, optimizer, {} if config.momentum_at_sync == "reset" else states[worker])
            rates = [config.lr / (1 + round * len(batches) + step) for step in range(len(batches))]
            run_steps(replica, optimizer, batches, rates)
            replies.append(replica.state_dict())
            states[worker] = optimizer_state(named, optimizer)
        glob = mean(replies)
        if config.momentum_at_sync == "average":
            states = [mean(states)] * WORKERS
    return glob


def large_batch(model: nn.Module, config: Config, rounds: list[list[list[Batch]]]) -> dict[str, Tensor]:
    """One worker that steps on the union of what the K workers see at a step."""
    replica = copy.deepcopy(model)
    steps = [step for workers in rounds for step in zip(*workers, strict=True)]
    union = [(torch.cat([x for x, _ in step]), torch.cat([y for _, y in step])) for step in steps]
    rates = [config.lr / (1 + step) for step in range(len(union))]
    run_steps(replica, build_optimizer(config, dict(replica.named_parameters())), union, rates)
    return replica.state_dict()


def distance(keys: dict[str, Any], batchnorm: bool = False, local_steps: int = 1) -> float:
    """The largest difference of a parameter between LocalSGD and the large batch."""
    config = Config(lr=0.5, weight_decay=0.0, momentum=0.0).changed(keys)
    model, rounds = network(batchnorm), data(ROUNDS, local_steps)
    one, other = local_sgd(model, config, rounds), large_batch(model, config, rounds)
    return max(float((one[name] - other[name]).abs().max()) for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"weight-decay": 0.1},
        {"momentum": 0.9, "weight-decay": 0.1},
        {"momentum": 0.9, "weight-decay": 0.1, "momentum-at-sync": "average"},
        {"momentum": 0.9, "optimizer.nesterov": True},
        {"momentum": 0.9, "optimizer.nesterov": True, "momentum-at-sync": "average"},
    ],
)
def test_one_local_step_is_the_large_batch_step(keys: dict[str, Any]) -> None:
    assert distance(keys) <= 1e-15


@pytest.mark.parametrize(
    ("keys", "batchnorm"),
    [
        ({"momentum": 0.9, "momentum-at-sync": "reset"}, False),
        ({"momentum": 0.9}, True),
        ({"optimizer": "lars:trust=0.1", "weight-decay": 0.1}, False),
        ({"optimizer": "lamb", "lr": 0.01}, False),
    ],
)
def test_one_local_step_is_not_the_large_batch_step_with(keys: dict[str, Any], batchnorm: bool) -> None:
    assert distance(keys, batchnorm) > 1e-4


def test_several_local_steps_are_not_large_batch_steps() -> None:
    assert distance({}, local_steps=3) > 1e-3


class Quadratic(nn.Module):
    """f(x) = x' A x / 2 - b' x, whose gradient is A x - b."""

    def __init__(self, hessian: Tensor, linear: Tensor, start: Tensor) -> None:
        super().__init__()
        self.hessian, self.linear, self.x = hessian, linear, nn.Parameter(start.clone())

    def descend(self, steps: int, lr: float) -> Tensor:
        optimizer = torch.optim.SGD(self.parameters(), lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            (self.x @ self.hessian @ self.x / 2 - self.linear @ self.x).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return self.x.detach()


def quadratics(equal_hessians: bool) -> list[tuple[Tensor, Tensor]]:
    rng = np.random.default_rng(0)
    roots = [rng.normal(size=(4, 4)) for _ in range(3)]
    hessians = [root @ root.T / 4 + np.eye(4) for root in roots]
    if equal_hessians:
        hessians = hessians[:1] * 3
    return [(torch.from_numpy(a), torch.from_numpy(rng.normal(size=4))) for a in hessians]


def averaged(workers: list[tuple[Tensor, Tensor]], x: Tensor, rounds: int, local_steps: int, lr: float) -> Tensor:
    for _ in range(rounds):
        ends = [Quadratic(a, b, x).descend(local_steps, lr) for a, b in workers]
        x = weighted_mean(ends, [1 / 3] * 3)
    return x


@pytest.mark.parametrize("local_steps", [1, 5, 20])
def test_quadratic_workers_settle_where_theory_says(local_steps: int) -> None:
    """The fixed point is [sum A_k^-1-weighted S_k]: x = [sum S_k]^-1 sum S_k A_k^-1 b_k, S_k = I - (I - lr A_k)^J."""
    workers, lr = quadratics(equal_hessians=False), 0.1
    x = averaged(workers, torch.zeros(4, dtype=torch.float64), 400 // local_steps, local_steps, lr)
    eye = torch.eye(4, dtype=torch.float64)
    shrink = [eye - torch.linalg.matrix_power(eye - lr * a, local_steps) for a, _ in workers]
    pull = sum(s @ torch.linalg.solve(a, b) for s, (a, b) in zip(shrink, workers, strict=True))
    torch.testing.assert_close(x, torch.linalg.solve(sum(shrink), pull), rtol=0, atol=1e-14)
    optimum = torch.linalg.solve(sum(a for a, _ in workers), sum(b for _, b in workers))
    assert (float((x - optimum).abs().max()) < 1e-13) == (local_steps == 1)  # J > 1 settles beside the optimum


def test_equal_hessians_make_local_steps_central_ones() -> None:
    workers, start = quadratics(equal_hessians=True), torch.ones(4, dtype=torch.float64)
    x = averaged(workers, start, rounds=3, local_steps=7, lr=0.05)
    linear = torch.stack([b for _, b in workers]).mean(0)
    central = Quadratic(workers[0][0], linear, start).descend(21, 0.05)
    torch.testing.assert_close(x, central, rtol=0, atol=1e-14)
