"""The arrays of a message: a model's parameters, its buffers, and extras, distinguished by a prefix of their names.

A round treats them differently: parameters are averaged and pass through the server step, buffers are merged by
`batchnorm.merge`, and extras (for instance the optimizer states with `momentum-at-sync = average`) are averaged.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

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
        **with_prefix(BUFFERS, parts.buffers),
        **with_prefix(EXTRAS, parts.extras),
    }


def split(arrays: Mapping[str, Tensor]) -> Sections:
    """The inverse of `join`."""
    parameters = {name: value for name, value in arrays.items() if not name.startswith((BUFFERS, EXTRAS))}
    return Sections(parameters, under_prefix(BUFFERS, arrays), under_prefix(EXTRAS, arrays))


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` under names with `prefix`."""
    return {prefix + name: value for name, value in tensors.items()}


def under_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, which is removed from the names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def beside(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with their tensors moved to the device of `tensors`, which all lie on one."""
    device = next((tensor.device for tensor in tensors.values()), None)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}
