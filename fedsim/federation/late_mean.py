"""Means that arrive a round late, so that clients compute while models are on their way.

With `delay` = 1 a client begins a round from its own parameters of the end of the last one, takes its local steps to
z, and adds the difference from there to the model x that arrived in the meantime (CoCoD-SGD: Shen et al. 2019):

    y = z + (x - own)

It sends y and begins the next round from it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedsim.config import Config, kebab
from fedsim.errors import UserError

COMBINES = {  # key -> its values with which a client can begin a round before any message of it arrives
    "fraction": (1.0,),
    "local_rule": ("none", "fedprox"),
    "momentum_at_sync": ("keep", "reset"),
    "compress_down": ("none",),
}


def check_delay(config: Config) -> None:
    """Raise UserError where clients would need a message before they begin a round."""
    for name, values in COMBINES.items() if config.delay else ():
        if (value := getattr(config, name)) not in values:
            use = " or ".join(map(str, values))
            raise UserError(
                f"{kebab(name)} = {value} does not go with delay = {config.delay}, with which every client begins a "
                f"round before the message of the server arrives: give {use}"
            )


def add_late(z: Mapping[str, Tensor], x: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """z + (x - own), for each parameter in `x`: after local steps from `own` to `z`."""
    return {name: z[name] + (value.to(z[name].device) - own[name].to(z[name].device)) for name, value in x.items()}
