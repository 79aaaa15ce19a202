"""Strategies as a user of Flower writes them, in good ways and in bad ones."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedAvg

Aggregated = tuple[ArrayRecord | None, MetricRecord | None]
CALLS: list[int] = []


class SlowMo(FedAvg):
    """SlowMo at a constant rate, with attributes of its own."""

    def __init__(self, alpha: float = 1.0, beta: float = 0.5) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta
        self.x: list[Any] = []
        self.u: list[Any] = []

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Any:
        self.x = arrays.to_numpy_ndarrays()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert arrays is not None
        deltas = [x - mean for x, mean in zip(self.x, arrays.to_numpy_ndarrays(), strict=True)]
        self.u = [self.beta * u + delta for u, delta in zip(self.u or [0.0] * len(deltas), deltas, strict=True)]
        moved = [np.asarray(x - self.alpha * u) for x, u in zip(self.x, self.u, strict=True)]
        return ArrayRecord({name: Array(value) for name, value in zip(arrays, moved, strict=True)}), metrics


class Scaled(FedAvg):
    """Multiplies what FedAvg gives by a number."""

    def factor(self, server_round: int) -> float:
        return 1.0

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert arrays is not None
        factor = self.factor(server_round)
        scaled = {name: Array(np.asarray(array.numpy() * factor)) for name, array in arrays.items()}
        return ArrayRecord(scaled), metrics


class GlobalNoise(Scaled):
    def factor(self, server_round: int) -> float:
        return 1 + 1e-3 * random.random() * np.random.random()  # noqa: NPY002


class OwnGenerator(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)

    def factor(self, server_round: int) -> float:
        return float(1 + 1e-3 * self.rng.random())


class InModule(Scaled):
    def factor(self, server_round: int) -> float:
        CALLS.append(server_round)
        return 1 + 1e-3 * len(CALLS)


class Wrapper(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.inner = FedAdam()


class LaterAnObject(Scaled):
    def factor(self, server_round: int) -> float:
        if server_round == 5:
            self.generator = random.Random(0)
        return 1.0


class LaterAnError(Scaled):
    def factor(self, server_round: int) -> float:
        return {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}[server_round]


class SetsTheRate(FedAvg):
    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Any:
        config["lr"] = 0.1
        return super().configure_train(server_round, arrays, config, grid)


class SendsOtherArrays(FedAvg):
    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Any:
        zeros = {name: Array(np.zeros_like(array.numpy())) for name, array in arrays.items()}
        return super().configure_train(server_round, ArrayRecord(zeros), config, grid)


class Waits(FedAvg):
    """Flower's default: two clients or more."""

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Any:
        self.min_available_nodes = 2
        return super().configure_train(server_round, arrays, config, grid)


class OwnLoop(FedAvg):
    def start(self, *arguments: Any, **keywords: Any) -> Any:
        raise NotImplementedError
