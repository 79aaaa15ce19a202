"""A strategy of Flower's current API by its name, ``module:Class``: Flower's own or one of the user's."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import pkgutil
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

from flwr.serverapp.strategy import Strategy

from strategies.arguments import nearest

CURRENT_API = "flwr.serverapp.strategy"
# Attributes that the run sets, on strategies that have them: fedsim itself samples the workers
OF_THE_RUN = {
    "fraction_train": 1.0,
    "min_train_nodes": 1,
    "min_available_nodes": 1,
    "arrayrecord_key": "arrays",
    "configrecord_key": "config",
    "weighted_by_key": "num-examples",
    "train_loss_key": "train-loss",
}


def strategy_factory(name: str, **arguments: Any) -> Callable[[], Strategy]:
    """A function that makes the strategy `name` with `arguments`; raises ValueError with one line on what is wrong."""
    strategy_class = _class_of(name)

    def make() -> Strategy:
        with quiet():
            strategy = strategy_class(**arguments)
        for attribute, value in OF_THE_RUN.items():
            if hasattr(strategy, attribute):
                setattr(strategy, attribute, value)
        return strategy

    try:
        make()
    except Exception as error:  # an argument that it refuses, or lacks
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"it cannot be made ({why}): give other arguments") from error
    return make


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context manager: silence what Flower's strategies log of each round and of arguments that the run sets."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return next(iter(str(error).splitlines()), "")


def _class_of(name: str) -> type[Strategy]:
    module_name, _, class_name = name.partition(":")
    module = _module_of(module_name)
    found = getattr(module, class_name, None)
    if not _is_strategy(found):
        what = f"{module_name} has no {class_name}" if found is None else f"it is not a strategy of {CURRENT_API}"
        raise ValueError(
            what + nearest(class_name, [key for key, value in vars(module).items() if _is_strategy(value)])
        )
    if found.start is not Strategy.start:
        raise ValueError("it overrides the method start, but fedsim runs the rounds: leave it out")
    return found


def _is_strategy(value: object) -> TypeGuard[type[Strategy]]:
    return isinstance(value, type) and issubclass(value, Strategy) and not inspect.isabstract(value)


def _module_of(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"{name} needs the module {error.name}: install it where the server runs") from error
        parent, _, last = error.name.rpartition(".")  # the parent has been imported
        beside = [module.name for module in pkgutil.iter_modules(getattr(sys.modules.get(parent), "__path__", None))]
        hint = nearest(last, beside)
        where = "install it where the server runs, or put its folder on PYTHONPATH there"
        raise ValueError(f"there is no module {error.name}{hint}: {where}") from error
    except Exception as error:
        raise ValueError(f"{name} cannot be imported ({type(error).__name__}: {first_line(error)})") from error
