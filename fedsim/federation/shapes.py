"""The shapes of what messages and memories hold, and the values that it may have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import nn

from fedsim.config import Config
from fedsim.optim import zero_state
from fedsim.optim.domains import state_range
from strategies.batchnorm import batchnorm_buffers
from strategies.domain import ANY, LIMIT, Domain
from strategies.layers import NAMES, Layers
from strategies.method import Zeros
from strategies.sections import BUFFERS, EXTRAS, buffers_of, sections

USES = 1000  # more than a model calls one of its layers in a step


def zeros_of(config: Config, model: nn.Module) -> Zeros:
    """Zeros shaped like `model` and the state of its local optimizer."""
    zeros = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    parameters, buffers, _ = sections(zeros, buffers_of(model), {})
    return Zeros(
        parameters, buffers, batchnorm_buffers(model), partial(zero_state, config, dict(model.named_parameters()))
    )


def domains(names: Iterable[str], batchnorm: Mapping[str, str], layers: Layers, steps: int) -> dict[str, Domain]:
    """The domains of the tensors `names` after so many local steps, of those that have one narrower than `ANY`.

    They are those of a message, or of what a client keeps. `batchnorm` names BatchNorm's statistics.
    """
    of_layers, statistics = layers.domains(steps), layers.statistics()
    of_statistic = {name: statistics[entry] for name, entry in batchnorm.items()}
    of_statistic |= {n: Domain(0, steps * USES) for n, entry in batchnorm.items() if entry == "num_batches_tracked"}
    found = {}
    for name in names:
        key = name.removeprefix(EXTRAS).removeprefix(BUFFERS)
        owner, _, tensor = key.partition("/")
        if key in of_layers:
            found[name] = of_layers[key]
        elif owner in NAMES and "/" in tensor:  # an entry of the optimizer's state
            low, high = state_range(tensor.rpartition("/")[2], steps)
            found[name] = Domain(max(low, -LIMIT), min(high, LIMIT))
        else:
            found[name] = of_statistic.get(tensor if owner in NAMES else key, ANY)
    return {name: domain for name, domain in found.items() if domain != ANY}
