"""The methods of a run, as its keys say: nothing else reads these keys."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.registry import names_own
from fedsim.rng import Purpose, step_keys
from fedsim.training.local_steps import Decisions
from fedsim.training.run_plan import run_plan
from strategies.arguments import Choice
from strategies.compression import Chain, Codec
from strategies.layers import Layers
from strategies.mean import Mean
from strategies.method import Method
from strategies.wire import Wire

FIELD_OF = {  # the place of a layer -> the field that chooses it
    "test-model": "test_model",
    "outer": "outer",
    "local-rule": "local_rule",
    "momentum": "momentum_at_sync",
    "batchnorm": "batchnorm_at_sync",
}
OTHERS = "layer"  # the field of all other layers
OF_THE_SERVER = ("test-model", "outer")  # those of one's own have no part on a worker, which may not have their code


def layers_of(config: Config, server: bool = False, decided: Decisions = ()) -> Layers:
    """The layers of `config`, with those that have no part on a worker where this is the `server`.

    `decided`: what its schedule of J has decided so far, on which the seeds of messages depend.
    """
    layers: dict[str, Method] = {}
    for name, field in FIELD_OF.items():
        if server or name not in OF_THE_SERVER or _has_two_halves(config, field):
            layers.update((name, _made(config, field, choice)) for choice in config.choices(field))
    for choice in config.choices(OTHERS):
        name = choice.name.rpartition(":")[2]
        layers[name if name not in layers else f"{name}-{len(layers)}"] = _made(config, OTHERS, choice)
    wire = Wire(codec_of(config), codec_of(config, down=True), config.error_feedback, seed_of(config, decided))
    try:
        return Layers(layers, wire)
    except ValueError as error:
        raise _cannot(config, OTHERS, str(error)) from error


def _has_two_halves(config: Config, field: str) -> bool:
    """Whether the layer of a field of `OF_THE_SERVER` has a part on a worker."""
    if names_own(getattr(config, field)):
        return False
    kinds = [choice.kind for choice in config.choices(field)]
    return any(isinstance(kind, type) and getattr(kind, "end", None) is not Method.end for kind in kinds)


def field_of(layer: str) -> str:
    """The field that chooses the layer of this name."""
    return FIELD_OF.get(layer, OTHERS)


def mean_of(config: Config) -> Mean:
    """The mean of what the workers of `config` send."""
    mean: Mean = config.made("mean")
    return mean


def codec_of(config: Config, down: bool = False) -> Codec | None:
    """The codec of clients' updates, or of what the server sends (`down`); None where nothing is compressed."""
    field = "compress_down" if down else "compress"
    parts: list[Codec] = [_made(config, field, choice) for choice in config.choices(field)]
    if not parts:
        return None
    try:
        return functools.reduce(Chain, parts)
    except ValueError as error:
        raise _cannot(config, field, str(error)) from error


def _made(config: Config, field: str, choice: Choice) -> Any:
    """What a choice stands for; a strategy of Flower's becomes a layer."""
    try:
        if field == "outer" and not (isinstance(choice.kind, type) and issubclass(choice.kind, Method)):
            return _of_flower(config, choice) if isinstance(choice.kind, type) else choice.make()
        return choice.make()
    except (ValueError, TypeError) as error:
        raise _cannot(config, field, str(error)) from error


def _of_flower(config: Config, choice: Choice) -> Method:
    from strategies.by_name import strategy_factory  # only the server has what these import
    from strategies.flower_strategy import FlowerStrategy

    return FlowerStrategy(strategy_factory(choice.name, **choice.given), config.seed)


def _cannot(config: Config, field: str, reason: str) -> UserError:
    return UserError(f"{field.replace('_', '-')} = {getattr(config, field)}: {reason}")


def seed_of(config: Config, decided: Decisions = ()) -> Callable[[int, int | None], int]:
    """The seed of what a worker's message (None: the server's) and its decoding draw in a round."""

    def seed(round_: int, worker: int | None) -> int:
        purpose: Purpose = "broadcast" if worker is None else "compress"
        return int(step_keys(config.seed, worker or 0, run_plan(config, decided).first_step(round_), 1, purpose)[0])

    return seed


def fewest_updates(config: Config) -> int:
    """How many usable updates a round needs: a robust mean of too few is no robust one."""
    if any("all-updates" in layer.needs for _, layer in layers_of(config)):
        return config.clients
    return max(config.min_clients or 1, mean_of(config).fewest)
