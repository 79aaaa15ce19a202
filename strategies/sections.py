"""The arrays of a message: a model's parameters, its buffers, and extras, told apart by a prefix of their names.

Each takes its own way through a round: parameters through the mean and the server step, buffers through
`batchnorm.merge`, extras (for instance optimizer state that is averaged) through the mean alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

BUFFERS, EXTRAS = "buffers/", "extras/"  # parameters have no prefix


class Sections(NamedTuple):
    """Tensors by name, without their prefixes."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    extras: dict[str, Tensor]


def sections_of(model: nn.Module, extras: Mapping[str, Tensor]) -> Sections:
    """Copies of the state of `model`, and `extras`; the model itself knows which of its tensors are parameters."""
    names = {name for name, _ in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = {name: value for name, value in state.items() if name in names}
    buffers = {name: value for name, value in state.items() if name not in names}
    return Sections(parameters, buffers, dict(extras))


def join(sections: Sections) -> dict[str, Tensor]:
    """All tensors under their prefixed names."""
    return {
        **sections.parameters,
        **{BUFFERS + name: value for name, value in sections.buffers.items()},
        **{EXTRAS + name: value for name, value in sections.extras.items()},
    }


def split(arrays: Mapping[str, Tensor]) -> Sections:
    """The inverse of `join`."""
    sections = Sections({}, {}, {})
    for name, value in arrays.items():
        if name.startswith(BUFFERS):
            sections.buffers[name.removeprefix(BUFFERS)] = value
        elif name.startswith(EXTRAS):
            sections.extras[name.removeprefix(EXTRAS)] = value
        else:
            sections.parameters[name] = value
    return sections
