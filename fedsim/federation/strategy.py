"""The strategy of a run: what its keys say of the mean, the server's step and Flower's own strategies."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from flwr.serverapp.strategy import Strategy
from torch import nn

from fedsim.config import FIELDS, Config, arguments_of, check_used, kebab
from fedsim.data.datasets import training_images
from fedsim.data.partition import shard_sizes
from fedsim.device import one_thread
from fedsim.errors import UserError
from fedsim.federation.compress import check_compress, codec_of, compress_seed
from fedsim.federation.domains import domains
from fedsim.federation.flower_internals import let_messages_be_made
from fedsim.federation.protocol import CONTROL, MEMORY, fewest_updates
from fedsim.federation.round import initial_progress
from fedsim.locks import GLOBAL_GENERATORS
from fedsim.models import cpu_model
from fedsim.optim import check_optimizer
from fedsim.training.local_rule import check_local_rule
from fedsim.training.run_plan import RunPlan
from strategies import STRATEGIES, LocalSGD, batchnorm_buffers
from strategies.by_name import strategy_factory
from strategies.errors import StrategyFailed
from strategies.flower_strategy import FlowerStrategy, check_state
from strategies.outer import OuterStep, outer_step
from strategies.robust import trimmed_of
from strategies.screening import NOT_NEGATIVE, Domain, wrong_values

GOES_WITH_DELAY = {  # key -> its values with which a client can begin a round before any message of it arrives
    "fraction": (1.0,),
    "local_rule": ("none", "fedprox"),
    "momentum_at_sync": ("keep", "reset"),
    "compress_down": ("none",),
}


def build_strategy(
    config: Config, plan: RunPlan, model: nn.Module, images: Mapping[int, int] | None = None
) -> LocalSGD:
    """The strategy of `config` for the arrays of `model`.

    `images`: how many each worker holds, where it weighs by them (by default as many as its shard). They are read when
    an update is screened.
    """
    check_strategy(config)
    shards = shard_sizes(config)
    batchnorm = batchnorm_buffers(model)
    names = initial_progress(config, model).arrays.keys()

    def planned(round_: int, worker: int) -> Domain:
        if config.client_weights == "equal":
            trained = len(plan.samples(round_, shards[worker]))
            return Domain(trained, trained)
        held = shards[worker] if images is None else images[worker]
        return Domain(held, min(held, training_images(config)))

    of_run: dict[str, Any] = {
        "seed": config.seed,
        "population": config.clients,
        "fraction_train": config.fraction,
        "min_updates": fewest_updates(config),
        "examples": planned,
        "metrics": {"train-loss": NOT_NEGATIVE},  # a cross-entropy
        "domains": lambda round_: domains(names, batchnorm, config.batchnorm_at_sync, plan.first_step(round_ + 1)),
        "other_records": [MEMORY],
        "batchnorm": batchnorm,
        "batchnorm_at_sync": config.batchnorm_at_sync,
        "population_extras": CONTROL if config.local_rule == "scaffold" else None,
    }
    if config.strategy not in STRATEGIES:
        return FlowerStrategy(flower_strategy_of(config), **of_run)
    return STRATEGIES[config.strategy](
        **of_run,
        mean=config.mean,
        trim=config.trim,
        codec=codec_of(config),
        codec_down=codec_of(config, down=True),
        codec_seed=functools.partial(compress_seed, config, plan),
        outer=outer_step_of(config),
        lr=lambda round_: plan.rates(round_)[-1],
    )


def check_strategy(config: Config) -> None:
    """Raise UserError where the keys of the strategy, or those of the clients' steps, do not go together."""
    check_optimizer(config)
    check_local_rule(config)
    check_compress(config)
    check_delay(config)
    check_used(config, "mean", {"trim": ["trimmed"], "client_weights": ["exact", "clipped"]})
    check_used(config, "batchnorm_at_sync", {"batchnorm_images": ["re-estimated"]})
    of_localsgd = ("compress", "compress_down", "mean", "outer", "outer_args")
    check_used(config, "strategy", {key: list(STRATEGIES) for key in of_localsgd})
    check_mean(config)
    check_batchnorm(config)
    check_initial_values(config)
    outer_step_of(config)
    if config.strategy not in STRATEGIES:
        try_flower_strategy(config)
    elif config.strategy_args:
        raise UserError(f"strategy-args is not used by strategy = {config.strategy}: leave it out")


def check_delay(config: Config) -> None:
    """Raise UserError where clients would need a message before they begin a round."""
    for name, values in GOES_WITH_DELAY.items() if config.delay else ():
        if (value := getattr(config, name)) not in values:
            use = " or ".join(map(str, values))
            raise UserError(
                f"{kebab(name)} = {value} does not go with delay = {config.delay}, with which every client begins a "
                f"round before the message of the server arrives: give {use}"
            )


def check_mean(config: Config) -> None:
    """Raise UserError where a robust mean leaves out nothing, or has no meaning with the other keys."""
    workers = config.clients_per_round
    if config.mean != "exact" and workers < 3:
        raise UserError(f"mean = {config.mean} needs 3 clients in a round, not {workers}: give --mean exact")
    if config.mean == "trimmed" and trimmed_of(config.trim, workers) == 0:
        least = math.ceil(1000 / workers) / 1000
        raise UserError(f"trim = {config.trim} of {workers} clients is none: give {least:g} or more")
    sparse = config.compress in ("topk", "randomk") and config.compress_ratio < 1
    if config.mean in ("trimmed", "median") and sparse:
        raise UserError(
            f"mean = {config.mean} of updates of compress = {config.compress}, most of whose values are 0, would be 0: "
            "give --mean clipped or exact, or another --compress"
        )
    if config.mean != "exact" and config.batchnorm_at_sync in ("first-worker", "pooled", "local"):
        raise UserError(
            f"batchnorm-at-sync = {config.batchnorm_at_sync} trusts the statistics of every client, which mean = "
            f"{config.mean} does not: give --batchnorm-at-sync average or re-estimated"
        )


def check_batchnorm(config: Config) -> None:
    """Raise UserError where there is a rule for BatchNorm's statistics, but no BatchNorm."""
    rule = config.batchnorm_at_sync
    if rule != FIELDS["batchnorm_at_sync"].default and not batchnorm_buffers(cpu_model(config)):
        raise UserError(f"batchnorm-at-sync = {rule}: the model has no BatchNorm: give --batchnorm-at-sync average")


def check_initial_values(config: Config) -> None:
    """Raise UserError where the model begins with values for which every update of a client would be refused."""
    if wrong := wrong_values([cpu_model(config).state_dict()])[0]:
        raise UserError(f"model = {config.model}: {wrong} before training: in a mask, -1e9 does what -inf does")


def flower_strategy_of(config: Config) -> Callable[[], Strategy]:
    """What makes Flower's or the user's strategy of `config`; raises UserError where it cannot be made."""
    try:
        return strategy_factory(config.strategy, **arguments_of(config.strategy_args))
    except ValueError as error:
        arguments = f", strategy-args = {config.strategy_args}" if config.strategy_args else ""
        raise UserError(f"strategy = {config.strategy}{arguments}: {error}") from error


@one_thread()
def try_flower_strategy(config: Config) -> None:
    """Raise UserError where the strategy of `config` fails on made-up updates, or keeps what cannot be saved."""
    make = flower_strategy_of(config)
    let_messages_be_made()
    parameters = dict(cpu_model(config).named_parameters())
    try:
        with GLOBAL_GENERATORS:
            check_state(make, parameters, config.clients_per_round, config.seed)
    except StrategyFailed as error:
        raise UserError(f"strategy = {config.strategy}: a trial on made-up updates failed: {error}") from error


def outer_step_of(config: Config) -> OuterStep:
    """The server's step; raises UserError where its optimizer does not take its arguments."""
    try:
        return outer_step(config.outer, **arguments_of(config.outer_args))
    except ValueError as error:
        raise UserError(f"outer-args = {config.outer_args}: {error}") from error
