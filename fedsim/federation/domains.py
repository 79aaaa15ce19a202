"""What the server knows of the values that clients send: of each array of a message or a memory, by its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedsim.federation.protocol import BATCHNORM, OPTIMIZER, OWN
from fedsim.optim.domains import state_range
from strategies.batchnorm import batchnorm_domains
from strategies.screening import ANY, LIMIT, Domain
from strategies.sections import BUFFERS, EXTRAS

USES = 1000  # more than a model calls one of its layers in a step


def domains(names: Iterable[str], batchnorm: Mapping[str, str], how: str, steps: int) -> dict[str, Domain]:
    """The domains of the arrays `names` after so many local steps, of those that have one narrower than `ANY`.

    `batchnorm` names the buffers of BatchNorm, which are merged as `how` says (see `strategies.batchnorm`).
    """
    of_buffer = batchnorm_domains(batchnorm, how)
    for name, entry in batchnorm.items():
        if entry == "num_batches_tracked":
            of_buffer[name] = Domain(0, steps * USES)
    found = {}
    for name in names:
        key = name.removeprefix(EXTRAS)
        if key.startswith(OPTIMIZER):
            low, high = state_range(key.rpartition("/")[2], steps)
            found[name] = Domain(max(low, -LIMIT), min(high, LIMIT))
        else:
            for prefix in (BUFFERS, BATCHNORM, OWN):
                key = key.removeprefix(prefix)
            found[name] = of_buffer.get(key, ANY)
    return {name: domain for name, domain in found.items() if domain != ANY}
