"""The compression of what clients and the server send, as a run's keys say; and what a client keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedsim.config import Config, check_used
from fedsim.errors import UserError
from fedsim.federation.protocol import BATCHNORM, COMPRESS, CONTROL, CORRECTION, OPTIMIZER, OWN, SENT
from fedsim.optim import zero_state
from fedsim.rng import Purpose, step_keys
from fedsim.training.run_plan import RunPlan
from strategies import batchnorm_buffers
from strategies.compression import BUCKET, CODECS, Codec, encode, make_codec, receive
from strategies.sections import beside, with_prefix

QSGD_LEVELS = math.ceil(
    (BUCKET / 4) ** 0.5
)  # its squared error is at most BUCKET / (4 levels^2) of the update's square
USED_BY = {  # key -> the values of `compress` or `compress_down` that use it
    "compress_ratio": ("topk", "randomk"),
    "compress_levels": ("qsgd",),
    "compress_rank": ("powersgd",),
}


def codec_of(config: Config, down: bool = False) -> Codec | None:
    """The codec of clients' updates, or of what the server sends (`down`); None where nothing is compressed."""
    name = config.compress_down if down else config.compress
    return make_codec(name, config.compress_ratio, config.compress_levels, config.compress_rank)


def check_compress(config: Config) -> None:
    """Raise UserError where a key is given that no codec of `config` uses, or a residual would grow."""
    for name, codecs in USED_BY.items():
        check_used(config, "compress_down" if config.compress_down in codecs else "compress", {name: codecs})
    check_used(config, "compress", {"error_feedback": CODECS[1:]})
    if config.compress_levels >= QSGD_LEVELS:
        return
    if config.compress_down == "qsgd":
        raise UserError(
            f"compress-levels = {config.compress_levels}: with compress-down = qsgd what the messages leave out would "
            f"grow: give {QSGD_LEVELS} or more"
        )
    if config.compress == "qsgd" and config.error_feedback:
        raise UserError(
            f"compress-levels = {config.compress_levels}: with error feedback the residual would grow: give "
            f"{QSGD_LEVELS} or more, or --no-error-feedback"
        )


def compress_seed(config: Config, plan: RunPlan, round_: int, worker: int | None) -> int:
    """The seed of what a worker's message (None: the server's) and its decoding draw in a round."""
    purpose: Purpose = "broadcast" if worker is None else "compress"
    return int(step_keys(config.seed, worker or 0, plan.first_step(round_), 1, purpose)[0])


def zero_memory(config: Config, model: nn.Module) -> dict[str, Tensor]:
    """All that a client keeps between rounds of training `model` and the server has not, every entry zero."""
    parameters = dict(model.named_parameters())
    zeros = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    memory = with_prefix(OPTIMIZER, zero_state(config, parameters)) if config.momentum_at_sync == "keep" else {}
    if config.local_rule == "scaffold":
        memory |= with_prefix(CONTROL, zeros)
    if config.local_rule == "scaffold-inferred":
        memory |= with_prefix(CORRECTION, zeros) | with_prefix(SENT, zeros)
    if codec := codec_of(config):
        memory |= with_prefix(COMPRESS, encode(codec, zeros, {}, 0, config.error_feedback)[1])
    if config.batchnorm_at_sync == "local":
        buffers = dict(model.named_buffers())
        memory |= {BATCHNORM + name: torch.zeros_like(buffers[name]) for name in batchnorm_buffers(model)}
    if config.delay:
        memory |= {OWN + name: torch.zeros_like(value) for name, value in model.state_dict().items()}
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
    update = {name: value - y[name] for name, value in beside(y, x).items()}
    return encode(codec, update, beside(y, memory), seed, config.error_feedback)


def receive_change(
    config: Config, plan: RunPlan, round_: int, held: Mapping[str, Tensor], message: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The parameters of a client that holds `held`, after the server's `message` of a round."""
    codec = codec_of(config, down=True)
    assert codec is not None
    return receive(codec, beside(message, held), message, compress_seed(config, plan, round_, None))
