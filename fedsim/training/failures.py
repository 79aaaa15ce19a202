"""What stops a run and is no fault of fedsim: memory that is not there, and a model or augmentation of one's own."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import fedsim
import strategies
from fedsim.config import CHOSEN, Config
from fedsim.device import is_out_of_memory
from fedsim.errors import RunFailed, UserError
from fedsim.registry import describe, names_own
from fedsim.system.interrupts import interruption
from strategies.arguments import kebab

OUT_OF_MEMORY = "out of memory"  # how that failure begins
# The folders of fedsim and Python
NOT_OWN = tuple(str(Path(module.__file__ or "").parent) for module in (fedsim, strategies, os))


@contextlib.contextmanager
def failing_in_one_line(config: Config) -> Iterator[None]:
    """Context manager, in which a run of `config` is: what is no fault of fedsim is RunFailed, with the remedy."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if told := _told(error, config):
            raise RunFailed(told) from error
        raise


def _told(error: BaseException, config: Config) -> str:
    """The failure in words; empty where it is told already, or is a fault of fedsim."""
    if isinstance(error, UserError | RunFailed | OSError) or interruption(error):
        return ""
    if is_out_of_memory(error):
        return memory_lacks(config)
    own = [f"{kebab(key)} = {value}" for key in CHOSEN if names_own(value := getattr(config, key))]
    place = place_of(error) or _place(error, lambda file: "torch/nn/modules" in file)
    return f"{', '.join(own)} fails in training ({describe(error)}, {place})" if own and place else ""


def memory_lacks(config: Config) -> str:
    """What memory that is not there is told as."""
    return (
        f"{OUT_OF_MEMORY}: batch-size = {config.batch_size} and model = {config.model} on {config.device}: give a "
        "smaller --batch-size or model, or on a CPU more --threads, so that fewer clients train at a time"
    )


def place_of(error: BaseException) -> str:
    """The last line of the user's own code that led to `error`; "" if there is none."""
    return _place(error, lambda file: "site-packages" not in file and not file.startswith(NOT_OWN))


def _place(error: BaseException, chosen: Callable[[str], bool]) -> str:
    places = [f"{Path(f).name} line {line}" for f, line, *_ in traceback.extract_tb(error.__traceback__) if chosen(f)]
    return places[-1] if places else ""
