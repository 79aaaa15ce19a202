"""Which keys of a run do not go together, asked of its methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fedsim.config import FIELDS, Config
from fedsim.device import one_thread
from fedsim.errors import UserError
from fedsim.federation.decisions import planned
from fedsim.federation.flower_internals import let_messages_be_made
from fedsim.federation.own_methods import try_own_methods
from fedsim.federation.shapes import zeros_of
from fedsim.models import cpu_model
from fedsim.optim import check_optimizer
from fedsim.system.locks import GLOBAL_GENERATORS
from fedsim.training.methods import field_of, layers_of, mean_of
from fedsim.training.topology import rows_of, topology_of
from fedsim.training.workers import everyone, workers_of
from strategies.arguments import kebab
from strategies.batchnorm import batchnorm_buffers
from strategies.errors import StrategyFailed
from strategies.flower_strategy import FlowerStrategy, check_state
from strategies.layers import Layers
from strategies.momentum import is_second_moment
from strategies.screening import wrong_values

TRIED_ROUNDS = 20  # of a topology
EXACT = ("exact", "exact:weights=shard-size")


def properties(config: Config, layers: Layers) -> Mapping[str, tuple[str, Mapping[str, Sequence[Any]]]]:
    """What a layer may need: name -> (what it says, field -> the values with which a run has it)."""
    workers, sampled = workers_of(config), not everyone(config)
    unweighted = [config.mean] if not mean_of(config).by_shards else [config.mean.partition(":")[0]]
    of_sample = {"mean": unweighted, "local_epochs": (0,)} if sampled else {}
    of_a_round: dict[str, Sequence[Any]] = {"optimizer": ("sgdm",)}
    if config.momentum:
        of_a_round["momentum_at_sync"] = ("reset",)
    exact: dict[str, Sequence[Any]] = {"mean": EXACT}
    if any(layer.replaces_mean for _, layer in layers):
        exact["outer"] = ("none",)
    late: dict[str, Sequence[Any]] = {field_of(name): ("none",) for name, layer in layers if layer.own_start}
    whole = {"outer": ("none",), "compress": ("none",), "compress_down": ("none",)}
    there = {} if workers.always_there else {"workers": ("even",)}
    equal_steps = {"local_epochs": (0,), **({} if workers.alike else {"workers": ("even",)})}
    plain = {"optimizer": ("sgdm",), "momentum": (0.0,), "weight_decay": (0.0,)}
    asked = any("second-moments" in layer.needs for _, layer in layers)
    moments = {"optimizer": ("adamw",)} if asked and not _has_second_moments(config) else {}
    return {
        "plain-sgd": ("SGD without momentum and weight decay", plain),
        "sgd-of-a-round": ("SGD with momentum that is reset in each round", of_a_round),
        "second-moments": ("an optimizer that has second moments", moments),
        "no-delay": ("clients that begin from the model that they are sent", late),
        "equal-steps": ("as many local steps of each client", equal_steps),
        "all-clients": ("all clients in each round", {"fraction": (1.0,), **there}),
        "all-updates": (
            "the updates of all clients",
            {"fraction": (1.0,), **there, "min_clients": (0, config.clients)},
        ),
        "mean-is-next": ("the mean of all models as the next one", {**exact, **whole}),
        "mean-of-all": ("the exact mean of what clients send", {"mean": EXACT}),
        "exact-mean": ("the exact mean of what clients send", exact),
        "equal-shares": ("clients that count the same whoever else is sampled", of_sample),
        "whole-models": ("models as they are, not their changes", {"compress_down": ("none",)}),
        "plain-models": ("models as they are, not their changes", {"compress": ("none",), "compress_down": ("none",)}),
    }


def _has_second_moments(config: Config) -> bool:
    return any(map(is_second_moment, zeros_of(config, cpu_model(config)).optimizer))


def check_strategy(config: Config) -> None:
    """Raise UserError where the keys of the strategy, or those of the clients' steps, do not go together."""
    check_optimizer(config)
    check_codecs(config)
    check_layers(config)
    check_mean(config)
    check_topology(config)
    check_batchnorm(config)
    check_initial_values(config)
    try_own_methods(config)
    for _, layer in layers_of(config, server=True):
        if isinstance(layer, FlowerStrategy):
            try_flower_strategy(config, layer)


def check_layers(config: Config) -> None:
    """Raise UserError where a layer needs what the run does not have."""
    every = layers_of(config, server=True)
    layers = [(field_of(name), layer) for name, layer in every]
    known = properties(config, every)
    for key, layer in layers:
        if unknown := set(layer.needs) - known.keys():
            raise UserError(
                f"{_chosen(config, key)} needs {min(unknown)}, which no run says of itself: its class may need "
                f"{', '.join(known)}"
            )
        for what, values_of in (known[needed] for needed in layer.needs):
            for field, values in values_of.items():
                if (value := getattr(config, field)) not in values:
                    usual = f"--{kebab(field)} {str(values[0]).lower()}, or --{kebab(key)} {FIELDS[key].default}"
                    raise UserError(f"{kebab(field)} = {value}: {_chosen(config, key)} needs {what}: give {usual}")
        try:
            layer.up(1, dict(cpu_model(config).named_parameters()))
        except ValueError as error:
            raise UserError(f"{_chosen(config, key)}: {error}") from error
        if layer.partial and planned(config).rounds < layer.period:
            raise UserError(
                f"{_chosen(config, key)} sends each part of the model once in {layer.period} rounds, the run has "
                f"{planned(config).rounds}: give more rounds, or another --{kebab(key)}"
            )
    early = [_chosen(config, key) for key, layer in layers if layer.begins_early]
    for key, layer in layers if early else ():
        if layer.reads_message:
            raise UserError(
                f"{_chosen(config, key)} does not go with {early[0]}, with which every client begins a round before "
                f"the message of the server arrives: give another --{kebab(key)}"
            )


def _chosen(config: Config, field: str) -> str:
    return f"{kebab(field)} = {getattr(config, field)}"


def check_codecs(config: Config) -> None:
    """Raise UserError where error feedback has no use, or what messages leave out would grow."""
    wire = layers_of(config).wire
    if wire.up is None and not wire.feedback:
        raise UserError("error-feedback is not used by compress = none: leave it out, or give a codec")
    if wire.down and wire.down.grows:
        raise UserError(f"{_chosen(config, 'compress_down')}: {wire.down.grows}")
    if wire.up and wire.feedback and wire.up.grows:
        raise UserError(f"{_chosen(config, 'compress')}: {wire.up.grows}, or --no-error-feedback")


def check_mean(config: Config) -> None:
    """Raise UserError where a robust mean leaves out nothing, or has no meaning with the other keys."""
    mean, codec = mean_of(config), layers_of(config).wire.up
    if problem := mean.problem(config.clients_per_round):
        raise UserError(f"{_chosen(config, 'mean')}: {problem}")
    if mean.of_each_value and codec and codec.sparse:
        raise UserError(
            f"{_chosen(config, 'mean')} of updates of {_chosen(config, 'compress')} would be 0, as most values of "
            "these are: give --mean clipped or exact, or another --compress"
        )


def check_topology(config: Config) -> None:
    """Raise UserError where clients have models of their own, and a key needs one model or another mean of them."""
    topology = topology_of(config)
    if topology.one_model:
        return
    chosen = _chosen(config, "topology")
    if problem := topology.problem(config.clients):
        raise UserError(f"{chosen}: {problem}: give another --topology")
    if not mean_of(config).exact:
        raise UserError(f"{_chosen(config, 'mean')} does not go with {chosen}: give --mean exact or --topology all")
    layers = layers_of(config, server=True)
    keys = [field_of(name) for name, layer in layers if layer.one_model]
    for key in [*keys, *(["compress_down"] if layers.wire.down else [])]:
        raise UserError(
            f"{_chosen(config, key)} needs one model of all clients, which they do not have with {chosen}: give "
            f"--{kebab(key)} {FIELDS[key].default} or --topology all"
        )
    for round_ in range(1, min(TRIED_ROUNDS, planned(config).rounds) + 1):
        rows_of(config, round_)


def check_batchnorm(config: Config) -> None:
    """Raise UserError where there is a rule for BatchNorm's statistics, but no BatchNorm."""
    field = field_of("batchnorm")
    if getattr(config, field) != FIELDS[field].default and not batchnorm_buffers(cpu_model(config)):
        raise UserError(f"{_chosen(config, field)}: the model has no BatchNorm: give --batchnorm-at-sync average")


def check_initial_values(config: Config) -> None:
    """Raise UserError where the model begins with values for which every update of a client would be refused."""
    if wrong := wrong_values([cpu_model(config).state_dict()])[0]:
        raise UserError(f"model = {config.model}: {wrong} before training: in a mask, -1e9 does what -inf does")


@one_thread()
def try_flower_strategy(config: Config, layer: FlowerStrategy) -> None:
    """Raise UserError where the strategy of `config` fails on made-up updates, or keeps what cannot be saved."""
    let_messages_be_made()
    parameters: dict[str, Tensor] = dict(cpu_model(config).named_parameters())
    try:
        with GLOBAL_GENERATORS:
            check_state(layer.make, parameters, config.clients_per_round, config.seed)
    except StrategyFailed as error:
        raise UserError(f"outer = {config.outer}: a trial on made-up updates failed: {error}") from error
