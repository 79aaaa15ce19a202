from __future__ import annotations

import torch

from fedsim.config import Config
from fedsim.training.local_round import RoundStart, round_inputs


def test_the_inputs_of_a_local_step_do_not_depend_on_j(small: Config) -> None:
    """Rounds of 2 steps and rounds of 3 read the same images, crops, mirrors, masks and rates at the same step."""
    config = small.changed({"schedule": "cosine", "rounds": 12, "local-steps": 1})
    longer = {j: config.changed({"local-steps": j, "rounds": 12 // j}) for j in (1, 2, 3)}
    seen = {}
    for j, one in longer.items():
        rounds = [round_inputs(one, RoundStart(2, round_, {}, {})) for round_ in range(1, 12 // j + 1)]
        seen[j] = (
            torch.cat([inputs.drawn for inputs in rounds], dim=1),
            torch.cat([inputs.dropout_keys for inputs in rounds]),
            torch.tensor([rate for inputs in rounds for rate in inputs.rates]),
        )
    for j in (2, 3):
        assert all(torch.equal(one, other) for one, other in zip(seen[1], seen[j], strict=True))
    assert len(set(seen[1][1].tolist())) == 12
