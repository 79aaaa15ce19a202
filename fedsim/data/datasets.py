"""The data set of a run and its task, with an optional validation split."""

from __future__ import annotations

import functools
from dataclasses import replace

from fedsim.config import Config
from fedsim.data.own_arrays import names_of
from fedsim.data.task import Dataset, Examples, Task
from fedsim.errors import UserError
from fedsim.registry import TASKS, imported, is_own
from fedsim.rng import generator
from fedsim.system.locks import READING


def task_of(config: Config) -> Task:
    """The task of the data set of `config`. What a function of the user's returns says what its task is.

    Of the others no data is read.
    """
    for choice in config.choices("dataset"):
        if isinstance(choice.kind, type) and issubclass(choice.kind, Task):
            task: Task = config.made("dataset")
            return task
    names = names_of(config.dataset) if is_own(config.dataset) else frozenset[str]()
    kinds: list[type[Task]] = [imported(place) for place in TASKS.values()]
    return next((kind for kind in kinds if kind.takes(names)), kinds[0]).of(config.dataset)


def load_dataset(config: Config, verify: bool = True) -> Dataset[Examples]:
    """The data set of `config` (resolved) on its device; a process reads it only once.

    With `verify`, the data is verified first (see `Task.verify`).

    With a validation split, `test` holds the examples held out of `train`, so that no choice can depend on the test
    examples. Server and clients draw the same split from the seed.
    """
    with READING:
        task = task_of(config)
        if config.validation >= (available := task.training_examples(config)):
            raise UserError(
                f"validation = {config.validation} leaves none of the {available} training {task.metric.examples}: "
                "give less"
            )
        if verify:
            task.verify(config)
        whole = task.whole(config)
        return _hold_out(whole, config.validation, config.seed) if config.validation else whole


@functools.lru_cache(maxsize=1)  # a split is a copy of the examples
def _hold_out(whole: Dataset[Examples], count: int, seed: int) -> Dataset[Examples]:
    order = generator(seed, 0, 0, "validation").permutation(len(whole.train))
    train, test = (whole.train.subset(part) for part in (order[count:], order[:count]))
    return replace(whole, train=train, test=test)


def digests_of(config: Config) -> dict[str, str]:
    """The SHA-256 of each array of the data set of `config`, whatever its device and validation."""
    return task_of(config).digests(config)


def verify_data(config: Config) -> None:
    """Verify the data set of `config`, once per process (see `Task.verify`)."""
    task_of(config).verify(config)


def training_examples(config: Config) -> int:
    """The number of examples that `config` trains on."""
    return task_of(config).training_examples(config) - config.validation


def recorded_examples(config: Config) -> int:
    """`training_examples` of a run, by its record: raises UserError for a function, as a record's is not run."""
    if is_own(config.dataset):
        raise UserError(f"dataset = {config.dataset} is not called for a record")
    return training_examples(config)
