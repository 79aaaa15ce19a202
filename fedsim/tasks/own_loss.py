"""Tensors of one's own, with a loss of one's own: whatever a function returns that is not of images."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.config import Config
from fedsim.data.image_sets import digest
from fedsim.data.metric import Metric
from fedsim.data.own_arrays import first_returned, returned
from fedsim.data.task import Batch, Dataset, Examples, Inputs, Task
from fedsim.errors import UserError
from fedsim.registry import failures_of, function_of
from strategies.domain import ANY

SPLITS = ("train", "test")
LOSS, TARGETS, GROUPS = "loss", "targets", "groups"
Tensors = dict[str, Tensor]  # by name, each with a first dimension of examples


class Rows(Examples):
    """Tensors on a device, of which an example is a row of each."""

    def __init__(self, tensors: Tensors, groups: Tensor, device: torch.device | str) -> None:
        self._tensors = {name: value.to(device) for name, value in tensors.items()}
        self._groups = groups

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def device(self) -> torch.device:
        return next(iter(self._tensors.values())).device

    @property
    def groups(self) -> Tensor:
        return self._groups

    def sample(self, index: NDArray[np.int64], words: NDArray[np.uint64]) -> Tensor:
        return torch.from_numpy(index)[None]

    def batch(self, drawn: Tensor, keys: Sequence[int], replicas: int = 1) -> Batch:
        rows = {name: value[drawn[0]] for name, value in self._tensors.items()}
        targets = rows.pop(TARGETS, drawn[0])  # else a model computes its loss of what it is given
        return _taken(rows), targets

    def plain(self, start: int, stop: int) -> Batch:
        return self.batch(torch.arange(start, min(stop, len(self)), device=self.device)[None], ())

    def subset(self, index: NDArray[np.int64]) -> Rows:
        part = copy.copy(self)
        chosen = torch.from_numpy(index)
        part._tensors = {name: value[chosen.to(value.device)] for name, value in self._tensors.items()}
        part._groups = self._groups[chosen]
        return part


@dataclass(frozen=True)
class OwnLoss(Task):
    """A model of the inputs, and a function of its outputs and the targets, or an own loss of the model.

    A function returns ``train_NAME`` and ``test_NAME`` for each tensor. The model is called with the one named inputs,
    or with all of them by their names, and ``targets`` are for the loss. ``loss`` is a function ``f(outputs, targets)``
    or the name of one; without it the model returns an object with a loss, as those of Hugging Face do. ``groups`` are
    integers by which partitions divide the examples, by default targets that are integers (N,).
    """

    dataset: str

    metric = Metric("loss", higher_is_better=False)
    loss_domain = ANY

    @staticmethod
    def takes(names: frozenset[str]) -> bool:
        return any(name.startswith("train_") for name in names) and "train_images" not in names

    @classmethod
    def of(cls, dataset: str) -> OwnLoss:
        return cls(dataset)

    def training_examples(self, config: Config) -> int:
        return len(_split(self.dataset, "cpu").train)

    def whole(self, config: Config) -> Dataset[Rows]:
        return _split(self.dataset, config.device)

    def digests(self, config: Config) -> dict[str, str]:
        return _split(self.dataset, "cpu").sha256

    def verify(self, config: Config) -> None:
        _check_repeatable(self.dataset)

    def outputs(self, config: Config) -> int:
        targets = _read(self.dataset).tensors["train"].get(TARGETS, torch.zeros(1))
        if targets.ndim == 1 and not targets.is_floating_point():
            return 1 + int(targets.max())
        return int(targets[0].numel())

    def shape(self, config: Config) -> tuple[int, ...]:
        rows = _read(self.dataset).tensors["train"]
        return tuple(next(value for name, value in rows.items() if name != TARGETS).shape[1:])

    def trial(self, config: Config, count: int) -> Batch:
        return _split(self.dataset, "cpu").train.plain(0, count)

    def taken(self, config: Config) -> str:
        names = [name for name in _read(self.dataset).tensors["train"] if name != TARGETS]
        return f"the {', '.join(names)} of {self.dataset}"

    def problem(self, config: Config, outputs: Any) -> str:
        if _read(self.dataset).loss or isinstance(getattr(outputs, LOSS, None), Tensor):
            return ""
        return f"it gives {type(outputs).__name__}, which has no loss: let it, or give the data a loss"

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(**batch[0]) if isinstance(batch[0], dict) else model(batch[0])

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        own = _read(self.dataset).loss
        loss: Tensor = own(outputs, targets) if own else outputs.loss
        return loss

    def sums(self, outputs: Any, targets: Tensor) -> dict[str, Tensor]:
        return {LOSS: self.loss(outputs, targets).double() * len(targets)}


def _taken(rows: Tensors) -> Inputs:
    """What a model is called with: the tensor named inputs alone, or all by name."""
    return rows["inputs"] if rows.keys() == {"inputs"} else rows


class Own(NamedTuple):
    """What a function returned: the tensors and the groups of each split, and the loss."""

    tensors: dict[str, Tensors]
    groups: dict[str, Tensor]
    loss: Callable[[Any, Tensor], Tensor] | None
    sha256: dict[str, str]


@functools.lru_cache(maxsize=2)
def _read(dataset: str) -> Own:
    own = _checked(dataset, first_returned(dataset))
    first_returned.cache_clear()
    return own


@functools.lru_cache(maxsize=4)
def _split(dataset: str, device: str) -> Dataset[Rows]:
    own = _read(dataset)
    train, test = (Rows(own.tensors[split], own.groups[split], device) for split in SPLITS)
    return Dataset(train, test, 1 + int(max(own.groups[split].max() for split in SPLITS)), own.sha256)


@functools.lru_cache(maxsize=8)
def _check_repeatable(dataset: str) -> None:
    first, again = _read(dataset).sha256, _checked(dataset, returned(dataset)).sha256
    if changed := [name for name in first if first[name] != again.get(name)]:
        raise UserError(
            f"dataset = {dataset} gives other {', '.join(changed)} when it is called again: draw with a seed, in the "
            "function itself"
        )


def _checked(dataset: str, given: Mapping[str, Any]) -> Own:
    """What the function of `dataset` returned, checked; raises UserError with what is wrong with it."""
    found = {name: _tensor(dataset, name, value) for name, value in given.items() if name != LOSS}
    of = {split: _of_split(found, split) for split in SPLITS}
    if problem := _problem(found, of):
        raise UserError(f"dataset = {dataset}: {problem}")
    sha256 = {name: digest(value.numpy()).hex() for name, value in found.items()}
    groups = {split: _groups(tensors) for split, tensors in of.items()}
    loss = given.get(LOSS)
    if isinstance(loss, str):
        loss = function_of(f"dataset = {dataset}: loss", loss)
    if loss is not None and not callable(loss):
        raise UserError(f"dataset = {dataset}: loss is {type(loss).__name__}: it must be a function or the name of one")
    if loss and TARGETS not in of["train"]:
        raise UserError(f"dataset = {dataset} has a loss and no train_targets: give them, or leave it to the model")
    tensors = {split: {name: value for name, value in own.items() if name != GROUPS} for split, own in of.items()}
    return Own(tensors, groups, loss, sha256)


def _of_split(found: Tensors, split: str) -> Tensors:
    first = f"{split}_"
    return {name.removeprefix(first): value for name, value in found.items() if name.startswith(first)}


def _tensor(dataset: str, name: str, value: Any) -> Tensor:
    with failures_of(f"dataset = {dataset}: {name} is no tensor"):
        return torch.as_tensor(value).cpu().contiguous()


def _problem(found: Tensors, of: dict[str, Tensors]) -> str:
    """What is wrong with the tensors of both splits, or ""."""
    if other := [name for name in found if not name.startswith(("train_", "test_"))]:
        return f"{other[0]} is neither train_NAME nor test_NAME nor loss"
    if lacking := of["train"].keys() ^ of["test"].keys():
        return f"{min(lacking)} is of one split: give train_{min(lacking)} and test_{min(lacking)}"
    if not of["train"].keys() - {TARGETS, GROUPS}:
        return "it has nothing for a model: give train_inputs and test_inputs"
    for name, value in found.items():
        if problem := _problem_of(value):
            return f"{name} {problem}"
    for split, tensors in of.items():
        counts = {f"{split}_{name}": len(value) for name, value in tensors.items()}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{name} {count}" for name, count in counts.items())
            return f"the numbers of examples differ: {told}"
    for name, like in of["train"].items():
        value = of["test"][name]
        if (value.shape[1:], value.dtype) != (like.shape[1:], like.dtype):
            return f"test_{name} is {_kind(value)}, and train_{name} {_kind(like)}: make them alike"
    groups = of["train"].get(GROUPS)
    if groups is not None and (groups.ndim != 1 or groups.is_floating_point()):
        return f"train_groups is {_kind(groups)}, not integers [N]"
    return ""


def _problem_of(value: Tensor) -> str:
    """What is wrong with one tensor, or ""."""
    if value.ndim == 0 or value.is_complex():
        return f"is {_kind(value)}: it must be real, with a first dimension of examples"
    if value.numel() == 0:
        return f"is empty: {_kind(value)}"
    return "holds nan or inf" if value.is_floating_point() and not bool(value.isfinite().all()) else ""


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _groups(tensors: Tensors) -> Tensor:
    """(N,) the groups of examples: given, or targets that are integers; else all are of one."""
    for name in (GROUPS, TARGETS):
        value = tensors.get(name)
        if value is not None and value.ndim == 1 and not value.is_floating_point():
            return value.long()
    return torch.zeros(len(next(iter(tensors.values()))), dtype=torch.int64)
