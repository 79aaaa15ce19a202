"""A task: what is learned from a data set. `fedsim.tasks` has one in each file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.config import Config
from fedsim.data.metric import Metric
from strategies.domain import NOT_NEGATIVE, Domain

Inputs = Tensor | dict[str, Tensor]  # of a model: a tensor, or tensors by name
Batch = tuple[Inputs, Tensor]  # inputs and targets, each with a first dimension of examples


class Examples(ABC):
    """N examples on a device.

    `groups`: (N,) integers by which partitions divide the examples: their classes, or the documents that they are of.
    `draws`: how many numbers `sample` draws for an example, among them the example's own.
    """

    draws: int = 1

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def groups(self) -> Tensor: ...

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample(self, index: NDArray[np.int64], words: NDArray[np.uint64]) -> Tensor:
        """(`draws`, B) int64 on the CPU: what is drawn for training on the B examples `index`, by B random words."""

    @abstractmethod
    def batch(self, drawn: Tensor, keys: Sequence[int], replicas: int = 1) -> Batch:
        """The batch of what `sample` has `drawn`, on the device.

        For K `replicas` side by side `drawn` is (`draws`, K * B), and a tensor (B, C, ...) of the inputs is
        (B, K * C, ...); the targets are (K * B, ...). `keys`: of each replica, for what else is drawn.
        """

    @abstractmethod
    def plain(self, start: int, stop: int) -> Batch:
        """The examples `start` to `stop` as they are tested."""

    @abstractmethod
    def subset(self, index: NDArray[np.int64]) -> Examples:
        """A copy of the examples `index`, in that order."""


E = TypeVar("E", bound=Examples, covariant=True)


@dataclass(frozen=True, eq=False)
class Dataset(Generic[E]):
    """Examples to train on, and to test on; the number of their groups, and the SHA-256 of each array that they are of.

    The digests are of all examples, also where some are held out for validation.
    """

    train: E
    test: E
    classes: int
    sha256: dict[str, str]


class Task(ABC):
    """The examples of a data set, how batches are drawn, the loss, the metrics, and what a model takes and gives.

    One's own extends it, and stands in place of a data set. Its methods get the configuration, resolved or not.
    """

    metric: Metric  # by which runs are compared
    of_images: bool = False  # whether its examples are `Images`, which a node may have of its own
    stacks: bool = False  # whether replicas can be one network, which is tried on random inputs
    loss_domain: Domain = NOT_NEGATIVE  # of the mean training loss of a worker; others are refused

    @staticmethod
    def takes(names: frozenset[str]) -> bool:
        """Whether what a function returns, with these names, is of this task."""
        return False

    @classmethod
    def of(cls, dataset: str) -> Task:
        """The task of a data set that is no task itself."""
        return cls()

    @abstractmethod
    def training_examples(self, config: Config) -> int:
        """The number of all training examples, also of those held out for validation."""

    @abstractmethod
    def whole(self, config: Config) -> Dataset[Examples]:
        """The data set on the device of `config`, without a validation split; a process reads it only once."""

    @abstractmethod
    def digests(self, config: Config) -> dict[str, str]:
        """The SHA-256 of each array of the data set, whatever the device."""

    def verify(self, config: Config) -> None:  # noqa: B027 (most have none)
        """Raise UserError where the data has changed since this process read it, or gives others when read again."""

    def check(self, config: Config) -> None:  # noqa: B027
        """Raise UserError where keys do not fit the data."""

    def is_capturable(self, config: Config) -> bool:
        """Whether a batch can be drawn in a CUDA graph, which replays what is done on the device alone."""
        return True

    @abstractmethod
    def outputs(self, config: Config) -> int:
        """The first argument of the function of a model: how many numbers it gives for an example, or a part of it."""

    @abstractmethod
    def shape(self, config: Config) -> tuple[int, ...]:
        """The shape of the inputs of an example."""

    @abstractmethod
    def trial(self, config: Config, count: int) -> Batch:
        """A made-up batch to try a model on."""

    @abstractmethod
    def taken(self, config: Config) -> str:
        """What a model takes, in words."""

    @abstractmethod
    def problem(self, config: Config, outputs: Any) -> str:
        """What is wrong with the outputs of a model for two examples, in words; empty if nothing is."""

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """The outputs of a model."""
        return model(batch[0])

    @abstractmethod
    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """The mean loss of a batch."""

    def losses(self, outputs: Tensor, targets: Tensor, replicas: int) -> Tensor:
        """(K,) those of K `replicas` in a stacked network, with outputs (K, B, ...) and targets (K * B, ...)."""
        parts = zip(outputs, targets.chunk(replicas), strict=True)
        return torch.stack([self.loss(*part) for part in parts])

    @abstractmethod
    def sums(self, outputs: Any, targets: Tensor) -> dict[str, Tensor]:
        """The sums of the loss and of each metric over the examples of a batch, by their names, as float64 scalars."""

    def values(self, outputs: Any, targets: Tensor) -> Tensor:
        """(B,) the metric of each example of a batch."""
        each = zip(outputs.chunk(len(targets)), targets.chunk(len(targets)), strict=True)
        return torch.stack([self.sums(*one)[self.metric.name] for one in each])


def with_floats(batch: Batch, dtype: torch.dtype) -> Batch:
    """`batch` with floating-point numbers in the type of a model's parameters."""

    def of(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    inputs, targets = batch
    taken = {name: of(value) for name, value in inputs.items()} if isinstance(inputs, dict) else of(inputs)
    return taken, of(targets)


def by(shape: Sequence[int]) -> str:
    """A shape in words."""
    return " x ".join(map(str, shape))
