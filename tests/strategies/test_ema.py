"""The moving average of models against PyTorch's."""

from __future__ import annotations

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from strategies.ema import Ema
from strategies.method import ServerRound, State


def test_it_is_pytorchs() -> None:
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))  # type: ignore[no-untyped-call]
    state: State = {}
    for round_ in range(1, 6):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3, generator=torch.Generator().manual_seed(round_)))
        theirs.update_parameters(model)
        x = {name: value.clone() for name, value in model.state_dict().items()}
        state = Ema(0.8).update(ServerRound(round_, True, {}, {}, next_x=x), state, {})
    for name, value in Ema(0.8).model_for_test(x, state).items():
        torch.testing.assert_close(value, theirs.module.state_dict()[name], rtol=1e-14, atol=0)
