"""What may be chosen by name, and code of one's own as ``package.module:function``."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fedsim.errors import UserError
from fedsim.interrupts import interruption

# Each model is a function of the number of classes. If it has a parameter `image`, it is given the shape (C, H, W) of
# an image, and if it has a parameter `norm`, the key of that name.
MODELS = {
    "lenet-bn": "fedsim.models.lenet:LeNetBN",
    "lenet5": "fedsim.models.lenet:LeNet5",
    "resnet20": "fedsim.models.resnet:resnet20",
    "resnet18": "fedsim.models.resnet:resnet18",
    "resnet18-v2": "fedsim.models.resnet:resnet18_v2",
    "vit-tiny": "fedsim.models.vit:vit_tiny",
}
# Methods (`strategies.method`), codecs and what is tested, each with its arguments
LOCAL_RULES = {
    "fedprox": "strategies.fedprox:FedProx",
    "scaffold": "strategies.scaffold:Scaffold",
    "scaffold-inferred": "strategies.scaffold:ScaffoldInferred",
    "feddyn": "strategies.feddyn:FedDyn",
    "fednova": "strategies.fednova:FedNova",
}
OUTER_STEPS = {"fedexp": "strategies.fedexp:FedExP"}  # besides the optimizers of `strategies.outer`
MEANS = {
    "exact": "strategies.mean:Exact",
    "trimmed": "strategies.robust:Trimmed",
    "median": "strategies.robust:Median",
    "clipped": "strategies.robust:Clipped",
}
TEST_MODELS = {"ema": "strategies.ema:Ema"}
CODECS = {
    "fp16": "strategies.compression:Fp16",
    "bf16": "strategies.compression:Bf16",
    "int8": "strategies.compression:Int8",
    "int4": "strategies.compression:Int4",
    "sign": "strategies.compression:Sign",
    "topk": "strategies.compression:TopK",
    "randomk": "strategies.compression:RandomK",
    "qsgd": "strategies.compression:QSGD",
    "powersgd": "strategies.compression:PowerSGD",
}
DATASETS = ("cifar100", "synthetic", "cifar10", "fashion-mnist")


def kinds_of(registry: Mapping[str, str]) -> dict[str, type]:
    """The classes that a registry of methods names."""
    places = {name: place.partition(":") for name, place in registry.items()}
    return {name: getattr(importlib.import_module(module), kind) for name, (module, _, kind) in places.items()}


def is_function(value: str) -> bool:
    """Whether `value` has the form ``package.module:function``."""
    return bool(re.fullmatch(r"([^\W\d]\w*\.)*[^\W\d]\w*:[^\W\d]\w*", value))


def function_of(key: str, value: str) -> Callable[..., Any]:
    """The function that `value` names, imported; raises UserError, which names `key`, where it cannot be."""
    module, _, name = value.partition(":")
    if module == "__main__":  # it is another module in every other process, and has no source in a notebook
        raise UserError(f"{key} = {value}: it cannot be imported by name: define it in a file NAME.py of its own")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{key} = {value}: no module {error.name} on this machine: install it, or put its folder on PYTHONPATH"
        ) from error
    except SystemExit as error:
        if type(error) is not SystemExit:  # a signal's
            raise
        raise UserError(
            f"{key} = {value}: {module} exits where it is imported: let only a script do so, below "
            'if __name__ == "__main__":'
        ) from error
    except Exception as error:  # the module's own code may raise anything
        raise UserError(f"{key} = {value}: {module} cannot be imported ({describe(error)})") from error
    if not callable(function):
        raise UserError(f"{key} = {value}: {module} has no function {name}")
    return function  # type: ignore[no-any-return]


@contextlib.contextmanager
def failures_of(what: str, remedy: str = "") -> Iterator[None]:
    """Context manager around code that is not fedsim's: what it raises is a UserError that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # it may raise anything, and exit
        if interruption(error):
            raise
        raise UserError(f"{what} ({describe(error)})" + (f": {remedy}" if remedy else "")) from error


def describe(error: BaseException) -> str:
    """An error of code that is not fedsim's, on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
