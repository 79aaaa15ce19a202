from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fedsim.config import Config
from fedsim.optim import build_optimizer, set_lr
from tests.conftest import Call


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4 * 6 * 6, 5)


def set_gradients(model: nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize(("nesterov", "momentum"), [("true", 0.95), ("false", 0.5)])
def test_it_is_torchs_muon_and_adamw_bitwise(adjust: str, nesterov: str, momentum: float) -> None:
    """That of a convolution as a matrix with a row for each output channel, in any memory layout."""
    arguments = f"momentum={momentum},nesterov={nesterov},adjust-lr={adjust.replace('_', '-')},other-lr=0.5"
    config = Config(optimizer=f"muon:{arguments}", weight_decay=0.1, decay_biases_and_norms=False)
    model, other = Network(), Network()
    model.to(memory_format=torch.channels_last)
    matrices = [nn.Parameter(weight.detach().flatten(1)) for weight in (other.conv.weight, other.linear.weight)]
    of_muon: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov == "true", "adjust_lr_fn": adjust}
    optimizers = [
        torch.optim.Muon(matrices, weight_decay=0.1, **of_muon),
        torch.optim.AdamW(
            [bias for bias in (other.conv.bias, other.linear.bias) if bias is not None], weight_decay=0, fused=True
        ),
    ]
    ours = build_optimizer(config, dict(model.named_parameters()))
    for step in range(4):
        set_gradients(model, step)
        set_gradients(other, step)
        for matrix, weight in zip(matrices, (other.conv.weight, other.linear.weight), strict=True):
            assert weight.grad is not None
            matrix.grad = weight.grad.flatten(1)
        lr = 0.02 / (1 + step)
        set_lr(ours, lr)
        ours.step()
        for optimizer, its_lr in zip(optimizers, (lr, 0.5 * lr), strict=True):
            set_lr(optimizer, its_lr)
            optimizer.step()
    expected = dict(other.named_parameters()) | dict(zip(("conv.weight", "linear.weight"), matrices, strict=True))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name].view_as(parameter)), name


def test_the_optimizer_of_the_other_parameters_is_an_argument() -> None:
    model = Network()
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = build_optimizer(Config(optimizer="muon:other=sgd", weight_decay=0), dict(model.named_parameters()))
    set_lr(optimizer, 0.1)
    set_gradients(model, 0)
    optimizer.step()
    after = dict(model.named_parameters())["conv.bias"]
    assert after.grad is not None
    torch.testing.assert_close(after.data, before["conv.bias"].data - 0.1 * after.grad)


def test_a_wrong_other_optimizer_is_refused_in_a_line(call: Call) -> None:
    code, _, error = call("localsgd", "--optimizer", "muon:other=lbfgs")
    assert code == 2
    assert "muon: other = lbfgs must be one of adamw" in error
