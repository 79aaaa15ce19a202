"""The model that the reference trains on the batches of a run, and for which runs the reference knows every part."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.data.image_sets import load_images
from fedsim.data.partition import shard_of, shard_sizes
from fedsim.models import cpu_model, initial_model
from fedsim.models.dropout import Dropout, StepKeys
from fedsim.optim import build_optimizer
from fedsim.training.batchnorm import BATCH as CALIBRATION_BATCH
from fedsim.training.batchnorm import calibration_sample
from fedsim.training.local_round import RoundStart, round_inputs
from fedsim.training.local_steps import local_steps_schedule
from fedsim.training.methods import layers_of, seed_of
from fedsim.training.run_plan import run_plan
from strategies.arguments import split_name
from strategies.local_sgd import LocalSGD
from tests.oracle import (
    Combine,
    Compress,
    Outer,
    Tensors,
    adagrad,
    adam,
    adaptive_step,
    local_sgd,
    momentum_step,
    power_sgd,
    qsgd,
    random_k,
    reestimate,
    sign,
    topk,
    trimmed_mean,
    uniform,
    yogi,
)

OUTER: dict[str, tuple[Callable[..., Outer], dict[str, Any]]] = {  # with the defaults of the key
    "sgd": (momentum_step, {"lr": 1.0}),
    "fedavgm": (momentum_step, {"lr": 1.0, "momentum": 0.9}),
    "slowmo": (momentum_step, {"lr": 1.0, "momentum": 0.5, "per_lr": True}),
    "diloco": (momentum_step, {"lr": 0.7, "momentum": 0.9, "nesterov": True}),
    "fedadam": (adaptive_step, {"second_moment": adam, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3}),
    "fedyogi": (adaptive_step, {"second_moment": yogi, "lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-3}),
    "fedadagrad": (adaptive_step, {"second_moment": adagrad, "lr": 0.1, "betas": (0.0, 0.0), "eps": 1e-3}),
}
ARGUMENTS = ("lr", "momentum", "nesterov", "betas", "eps", "bias_correction")

CODECS: dict[str, Callable[[Mapping[str, Any], Tensor, torch.Generator], Tensor]] = {
    "fp16": lambda arguments, x, draws: x.clamp(-65504, 65504).half().double(),
    "bf16": lambda arguments, x, draws: x.bfloat16().double(),
    "int8": lambda arguments, x, draws: uniform(x, 127),
    "int4": lambda arguments, x, draws: uniform(x, 7),
    "sign": lambda arguments, x, draws: sign(x),
    "topk": lambda arguments, x, draws: topk(x, arguments["ratio"]),
    "randomk": lambda arguments, x, draws: random_k(x, arguments["ratio"], draws),
    "qsgd": lambda arguments, x, draws: qsgd(x, arguments["levels"], draws),
}


def compress_of(config: Config, field: str) -> Compress | None:
    """What arrives of an update; None where it is sent as it is."""
    if not config.choices(field):
        return None
    choice = config.choice(field)
    plan, codec, rank = run_plan(config), choice.name, choice.arguments.get("rank", 0)
    rights: dict[tuple[int | None, str], Tensor] = {}  # PowerSGD's, by worker and parameter

    def compress(update: Tensors, worker: int | None, step: int) -> Tensors:
        round_ = bisect.bisect_right(plan.starts, step)
        draws = torch.Generator().manual_seed(seed_of(config)(round_, worker))
        if codec != "powersgd":
            return {name: CODECS[codec](choice.arguments, value, draws) for name, value in update.items()}
        arrived = dict(update)
        for name, value in update.items():
            rows, columns = len(value), value[0].numel()
            if value.ndim > 1 and rank <= rows and rank * (rows + columns) < rows * columns:
                drawn = torch.randn(columns, rank, generator=draws).double()
                right = rights.get((worker, name), torch.zeros_like(drawn))
                arrived[name], rights[worker, name] = power_sgd(value, right, drawn)
        return arrived

    return compress


MEANS: dict[str, Callable[[float], Combine | None]] = {
    "exact": lambda trim: None,
    "trimmed": lambda trim: functools.partial(trimmed_mean, trim=trim),
    "median": lambda trim: functools.partial(trimmed_mean, trim=0.5),
    "clipped": lambda trim: None,
}


def covers(config: Config) -> bool:
    """Whether the reference knows every part of a run of `config` (resolved): then `reference` is its model."""
    # A codec that follows another one meets ties, which rounding errors of 1e-16 break in one way or the other
    both = tuple("+".join(choice.name for choice in config.choices(field)) for field in ("compress", "compress_down"))
    codecs = [*config.choices("compress"), *config.choices("compress_down")]
    outer = config.choices("outer")
    no_ties = "" in both or both == ("topk", "topk")
    has_buffers = any(True for _ in cpu_model(config).buffers())
    has_extras = config.momentum_at_sync == "average" or config.local_rule == "scaffold"
    # An inferred mean of gradients is weighted by the rates of the steps
    one_rate = config.schedule == "constant" and config.warmup_epochs == 0
    return (
        split_name(config.local_rule)[0] in ("none", "fedprox", "scaffold", "scaffold-inferred")
        and (config.local_rule != "scaffold-inferred" or one_rate)
        and all(name in CODECS or name in ("", "powersgd") for name in both)
        # It takes as many steps with every worker, in every round, and knows them before
        and config.workers == "even"
        and not local_steps_schedule(config).decides
        and config.topology == "all"
        and (not config.local_epochs or len(set(shard_sizes(config))) == 1)
        and config.precision == "fp64"
        and split_name(config.mean)[0] in MEANS
        # The reference clips parameters alone
        and (split_name(config.mean)[0] != "clipped" or not (has_buffers or has_extras))
        # The factors of a matrix of lower rank are not determined
        and config.batch_size >= max([0, *(choice.arguments.get("rank", 0) for choice in codecs)])
        and no_ties
        and all(choice.name in OUTER and choice.given.keys() <= set(ARGUMENTS) for choice in outer)
    )


def reference(config: Config) -> dict[str, Tensor]:
    """The model that the reference trains from the same weights on the same batches."""
    images = load_images(config).train
    plan = run_plan(config)
    model = initial_model(config)
    step_keys = StepKeys()

    def use_keys(layer: Dropout, _: Any) -> None:
        layer.keys = step_keys  # in a copy of the model too

    def batch(worker: int, step: int) -> tuple[Tensor, Tensor]:
        round_ = bisect.bisect_right(plan.starts, step)
        inputs = round_inputs(config, RoundStart(worker, round_, {}, {}))
        local_step = step - plan.first_step(round_)
        part = slice(local_step * config.batch_size, (local_step + 1) * config.batch_size)
        step_keys.begin_step(inputs.dropout_keys[local_step])
        crops, labels = images.batch(inputs.drawn[:, part], [inputs.augment_keys[local_step]])
        return crops.double(), labels

    for layer in model.modules():
        if isinstance(layer, Dropout):
            layer.register_forward_pre_hook(use_keys)
    everyone = list(range(config.clients))
    sampling = LocalSGD(fraction_train=config.fraction, seed=config.seed)
    of_outer, mean = config.choices("outer"), config.choice("mean")
    make_outer, defaults = OUTER[of_outer[0].name] if of_outer else (None, {})
    keep = {
        "momentum_at_sync": config.momentum_at_sync,
        "batchnorm_at_sync": split_name(config.batchnorm_at_sync)[0],
    }
    local_sgd(
        model,
        lambda replica: build_optimizer(config, dict(replica.named_parameters())),
        batch,
        plan.lr,
        config.clients,
        [plan.steps(round_) for round_ in range(1, plan.rounds + 1)],
        sample=lambda round_: sampling.sample(round_, everyone),
        weights=None
        if mean.arguments.get("weights", "equal") == "equal"
        else [len(shard_of(config, worker)) for worker in everyone],
        combine=MEANS[mean.name](mean.arguments.get("trim", 0.0)),
        clip=mean.name == "clipped",
        compress=compress_of(config, "compress"),
        compress_down=compress_of(config, "compress_down"),
        error_feedback=config.error_feedback,
        outer=make_outer(**{**defaults, **of_outer[0].given}) if make_outer else None,
        prox_mu=layers_of(config).terms.pull,
        scaffold=config.local_rule in ("scaffold", "scaffold-inferred"),
        delay=config.layer == "delay",
        **keep,  # type: ignore[arg-type]
    )
    if count := layers_of(config).reestimates_on:
        crops = torch.split(calibration_sample(config, images, count), CALIBRATION_BATCH, dim=1)
        reestimate(model, (images.crop(*batch).double() for batch in crops))
    return model.state_dict()
