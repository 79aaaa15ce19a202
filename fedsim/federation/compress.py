"""The compression of a client's update on its way to the server, as a run's keys say."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedsim.config import Config, check_used
from fedsim.errors import UserError
from fedsim.federation.protocol import COMPRESS, CONTROL, OPTIMIZER, with_prefix
from fedsim.optim import zero_state
from fedsim.rng import step_keys
from fedsim.training.run_plan import RunPlan
from strategies.compression import BUCKET, Codec, encode, make_codec

QSGD_LEVELS = math.ceil(
    (BUCKET / 4) ** 0.5
)  # its squared error is at most BUCKET / (4 levels^2) of the update's square
USED_BY = {  # key -> the values of `compress` that use it
    "compress_ratio": ("topk", "randomk"),
    "compress_levels": ("qsgd",),
    "compress_rank": ("powersgd",),
    "error_feedback": ("fp16", "bf16", "int8", "int4", "sign", "topk", "randomk", "qsgd", "powersgd"),
}


def codec_of(config: Config) -> Codec | None:
    """The codec of `config`; None where updates are sent as they are."""
    return make_codec(config.compress, config.compress_ratio, config.compress_levels, config.compress_rank)


def check_compress(config: Config) -> None:
    """Raise UserError where a key is given that the codec of `config` does not use, or its residuals would grow."""
    check_used(config, "compress", USED_BY)
    if config.compress == "qsgd" and config.error_feedback and config.compress_levels < QSGD_LEVELS:
        raise UserError(
            f"compress-levels = {config.compress_levels}: with error feedback the residual would grow: give "
            f"{QSGD_LEVELS} or more, or --no-error-feedback"
        )


def compress_seed(config: Config, plan: RunPlan, round_: int, worker: int) -> int:
    """The seed of what a worker's message and its decoding draw in a round."""
    return int(step_keys(config.seed, worker, plan.first_step(round_), 1, "compress")[0])


def zero_memory(config: Config, model: nn.Module) -> dict[str, Tensor]:
    """All that a client keeps between rounds of training `model`, every entry there and zero."""
    parameters = dict(model.named_parameters())
    zeros = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    memory = with_prefix(OPTIMIZER, zero_state(config, parameters)) if config.momentum_at_sync == "keep" else {}
    if config.local_rule == "scaffold":
        memory |= with_prefix(CONTROL, zeros)
    if codec := codec_of(config):
        memory |= with_prefix(COMPRESS, encode(codec, zeros, {}, 0, config.error_feedback)[1])
    return memory


def zero_extras(config: Config, model: nn.Module) -> dict[str, Tensor]:
    """What is averaged beside the model, at the start of a run."""
    parameters = dict(model.named_parameters())
    extras = with_prefix(OPTIMIZER, zero_state(config, parameters)) if config.momentum_at_sync == "average" else {}
    if config.local_rule == "scaffold":
        zeros = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        extras |= with_prefix(CONTROL, zeros)
    return extras


def compress_update(
    config: Config,
    codec: Codec,
    x: Mapping[str, Tensor],
    y: Mapping[str, Tensor],
    memory: Mapping[str, Tensor],
    seed: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The message of the update from the parameters `x` to those in `y`, and what its client then remembers."""
    update = {name: value.to(y[name].device) - y[name] for name, value in x.items()}
    device = next(iter(update.values())).device
    held = {name: value.to(device) for name, value in memory.items()}
    return encode(codec, update, held, seed, config.error_feedback)
