from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fedsim.config import Config
from fedsim.optim import build_optimizer, set_lr
from tests.conftest import Call


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))


def gradients(model: nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize(("nesterov", "momentum"), [(True, 0.95), (False, 0.5)])
def test_it_is_torchs_muon_and_adamw_bitwise(adjust: str, nesterov: bool, momentum: float) -> None:
    """That of a convolution as a matrix with a row for each output channel, in any memory layout."""
    text = (
        f"muon:momentum={momentum},nesterov={str(nesterov).lower()},adjust-lr={adjust.replace('_', '-')},other-lr=0.5"
    )
    config = Config(optimizer=text, weight_decay=0.1, decay_biases_and_norms=False)
    model, other = network(), network()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    matrices = {i: nn.Parameter(other[i].weight.detach().flatten(1)) for i in (0, 2)}
    of_muon: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "adjust_lr_fn": adjust, "weight_decay": 0.1}
    optimizers = [
        torch.optim.Muon(list(matrices.values()), **of_muon),
        torch.optim.AdamW([other[0].bias, other[2].bias], weight_decay=0, fused=True),
    ]
    ours = build_optimizer(config, dict(model.named_parameters()))
    for step in range(4):
        gradients(model, step)
        gradients(other, step)
        for i, matrix in matrices.items():
            matrix.grad = other[i].weight.grad.flatten(1)
        lr = 0.02 / (1 + step)
        set_lr(ours, lr)
        ours.step()
        for optimizer, its_lr in zip(optimizers, (lr, 0.5 * lr), strict=True):
            set_lr(optimizer, its_lr)
            optimizer.step()
    for i, matrix in matrices.items():
        assert torch.equal(model[i].weight, matrix.view_as(model[i].weight))
        assert torch.equal(model[i].bias, other[i].bias)


def test_the_optimizer_of_the_other_parameters_is_an_argument() -> None:
    model = network()
    before = copy.deepcopy(model)
    optimizer = build_optimizer(Config(optimizer="muon:other=sgd", weight_decay=0), dict(model.named_parameters()))
    set_lr(optimizer, 0.1)
    gradients(model, 0)
    optimizer.step()
    assert model[0].bias.grad is not None
    torch.testing.assert_close(model[0].bias.data, before[0].bias.data - 0.1 * model[0].bias.grad)


def test_a_wrong_other_optimizer_is_refused_in_a_line(call: Call) -> None:
    code, _, error = call("localsgd", "--optimizer", "muon:other=lbfgs")
    assert code == 2
    assert "muon: other = lbfgs must be one of adamw" in error
