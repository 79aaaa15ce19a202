"""The arrays of a message: a model's parameters, its buffers, and extras, distinguished by a prefix of their names.

A round treats them differently: parameters are averaged and pass through the server step, buffers are merged by
`batchnorm.merge`, and extras (for instance the optimizer states with `momentum-at-sync = average`) are averaged.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import Tensor, nn

BUFFERS, EXTRAS = "buffers/", "extras/"  # parameters have no prefix


class Sections(NamedTuple):
    """Tensors by name, without their prefixes."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    extras: dict[str, Tensor]


def buffers_of(model: nn.Module) -> set[str]:
    """The names in the state_dict of `model` that are not those of parameters."""
    return model.state_dict().keys() - {name for name, _ in model.named_parameters()}


def sections(state: Mapping[str, Tensor], buffers: Collection[str], extras: Mapping[str, Tensor]) -> Sections:
    """The sections of a model's state_dict, where `buffers` names its buffers, and `extras`."""
    return Sections(
        {name: value for name, value in state.items() if name not in buffers},
        {name: value for name, value in state.items() if name in buffers},
        dict(extras),
    )


def join(parts: Sections) -> dict[str, Tensor]:
    """All tensors under their prefixed names."""
    return {
        **parts.parameters,
        **{BUFFERS + name: value for name, value in parts.buffers.items()},
        **{EXTRAS + name: value for name, value in parts.extras.items()},
    }


def split(arrays: Mapping[str, Tensor]) -> Sections:
    """The inverse of `join`."""
    found = Sections({}, {}, {})
    for name, value in arrays.items():
        if name.startswith(BUFFERS):
            found.buffers[name.removeprefix(BUFFERS)] = value
        elif name.startswith(EXTRAS):
            found.extras[name.removeprefix(EXTRAS)] = value
        else:
            found.parameters[name] = value
    return found
