from __future__ import annotations

import pytest
import torch

from fedsim.config import Config
from fedsim.optim import build_optimizer, optimizer_state
from fedsim.optim.domains import SIGNED, state_range
from fedsim.registry import OPTIMIZERS
from strategies.momentum import SECOND_MOMENTS

STEPS = 5
KNOWN = {*SIGNED, *SECOND_MOMENTS, "step", "mu_product"}


@pytest.mark.parametrize(
    "keys",
    [
        *({"optimizer": name} for name in OPTIMIZERS.places),
        *({"optimizer": f"{name}:backend=torch-optimizer"} for name in ("lars", "lamb")),
        {"optimizer": "adam:amsgrad=true"},
        {"optimizer": "rmsprop:centered=true,momentum=0.9"},
    ],
)
def test_the_domain_of_every_entry_is_known_and_kept(keys: dict[str, str]) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = {name: torch.randn(shape, generator=generator) for name, shape in (("w", (3, 4)), ("b", (3,)))}
    optimizer = build_optimizer(Config().changed(keys), parameters)
    for _ in range(STEPS):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    state = optimizer_state(parameters, optimizer)
    entries = {name: name.rpartition("/")[2] for name in state}
    assert set(entries.values()) <= KNOWN
    for name, value in state.items():
        low, high = state_range(entries[name], STEPS)
        assert low <= value.min() <= value.max() <= high
