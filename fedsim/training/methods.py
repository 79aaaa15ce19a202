"""The methods of a run, as its keys say: nothing else reads these keys."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from fedsim.config import CHAIN, Config, arguments_of
from fedsim.errors import UserError
from fedsim.registry import CODECS, LOCAL_RULES, MEANS, OUTER_STEPS, TEST_MODELS, kinds_of
from fedsim.rng import Purpose, step_keys
from fedsim.training.run_plan import run_plan
from strategies.arguments import by_name
from strategies.batchnorm import BATCHNORM
from strategies.compression import Chain, Codec
from strategies.delay import Delay
from strategies.layers import Layers
from strategies.mean import Mean
from strategies.method import Method
from strategies.momentum import MOMENTUM
from strategies.outer import outer_step
from strategies.wire import Wire

KEY_OF = {  # the layer's name -> the field that chooses it
    "test-model": "test_model",
    "outer": "outer",
    "local-rule": "local_rule",
    "delay": "delay",
    "momentum": "momentum_at_sync",
    "batchnorm": "batchnorm_at_sync",
}


def layers_of(config: Config, server: bool = False) -> Layers:
    """The layers of `config`, with those that have no part on a worker where this is the `server`."""
    layers: dict[str, Method] = {
        "momentum": MOMENTUM[config.momentum_at_sync](),
        "batchnorm": BATCHNORM[config.batchnorm_at_sync](),
    }
    if config.local_rule != "none":
        layers["local-rule"] = _made("local-rule", LOCAL_RULES, config.local_rule, mu=config.prox_mu)
    if config.delay:
        layers["delay"] = Delay()
    if server:
        layers["outer"] = outer_of(config)
        if config.test_model != "none":
            layers["test-model"] = _made("test-model", TEST_MODELS, config.test_model)
    return Layers(layers, Wire(codec_of(config), codec_of(config, down=True), config.error_feedback, seed_of(config)))


def mean_of(config: Config) -> Mean:
    """The mean of what the workers of `config` send."""
    mean: Mean = _made("mean", MEANS, config.mean, trim=config.trim)
    return mean


def codec_of(config: Config, down: bool = False) -> Codec | None:
    """The codec of clients' updates, or of what the server sends (`down`); None where nothing is compressed."""
    key = "compress-down" if down else "compress"
    text = config.compress_down if down else config.compress
    if text == "none":
        return None
    given = {"ratio": config.compress_ratio, "levels": config.compress_levels, "rank": config.compress_rank}
    parts: list[Codec] = [_made(key, CODECS, part, **given) for part in re.split(CHAIN, text)]
    try:
        return functools.reduce(Chain, parts)
    except ValueError as error:
        raise UserError(f"{key} = {text}: {error}") from error


def _made(key: str, registry: Mapping[str, str], text: str, **given: float) -> Any:
    """The method that the text of a key names, with arguments of other keys where it has none itself."""
    try:
        return by_name(kinds_of(registry), text, **given)
    except ValueError as error:
        raise UserError(f"{key} = {text}: {error}") from error


def seed_of(config: Config) -> Callable[[int, int | None], int]:
    """The seed of what a worker's message (None: the server's) and its decoding draw in a round."""

    def seed(round_: int, worker: int | None) -> int:
        purpose: Purpose = "broadcast" if worker is None else "compress"
        return int(step_keys(config.seed, worker or 0, run_plan(config).first_step(round_), 1, purpose)[0])

    return seed


def outer_of(config: Config) -> Method:
    """The server's step, or Flower's or the user's strategy; raises UserError where it cannot be made."""
    name, _, arguments = config.outer.partition(":")
    if name in OUTER_STEPS:
        step: Method = _made("outer", OUTER_STEPS, config.outer)
        if config.outer_args:
            raise UserError(f"outer-args is not used by outer = {name}: give them to outer, as {name}:NAME=VALUE")
        return step
    if config.strategy == "localsgd":
        try:
            return outer_step(name, **arguments_of(config.outer_args), **arguments_of(arguments.replace("/", ":")))
        except (ValueError, TypeError) as error:
            given = f"outer-args = {config.outer_args}" if config.outer_args else f"outer = {config.outer}"
            raise UserError(f"{given}: {error}") from error
    from strategies.flower_strategy import FlowerStrategy  # only the server has what it imports

    return FlowerStrategy(flower_strategy_of(config), config.seed)


def flower_strategy_of(config: Config) -> Callable[[], Any]:
    """What makes Flower's or the user's strategy of `config`; raises UserError where it cannot be made."""
    from strategies.by_name import strategy_factory

    try:
        return strategy_factory(config.strategy, **arguments_of(config.strategy_args))
    except ValueError as error:
        arguments = f", strategy-args = {config.strategy_args}" if config.strategy_args else ""
        raise UserError(f"strategy = {config.strategy}{arguments}: {error}") from error


def fewest_updates(config: Config) -> int:
    """How many usable updates a round needs: a robust mean of too few is no robust one."""
    if any("all-updates" in layer.needs for _, layer in layers_of(config)):
        return config.clients
    return max(config.min_clients or 1, mean_of(config).fewest)
