from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_optimizer
from torch import Tensor, nn

from fedsim.config import Config
from fedsim.models import build_model
from fedsim.optim import build_optimizer, load_optimizer_state, optimizer_state, set_lr, zero_state
from fedsim.optim.lamb import LAMB
from fedsim.optim.lars import LARS
from fedsim.optim.torch_optimizers import TORCH_OPTIMIZERS

EVERY: list[dict[str, Any]] = [
    {"optimizer": "sgdm"},
    {"optimizer": "sgdm:nesterov=true"},
    {"optimizer": "lars", "decay-biases-and-norms": False},
    {"optimizer": "lamb", "decay-biases-and-norms": False},
    {"optimizer": "muon", "decay-biases-and-norms": False},
    {"optimizer": "lars:backend=torch-optimizer", "decay-biases-and-norms": False},
    {"optimizer": "lamb:backend=torch-optimizer", "decay-biases-and-norms": False},
    *({"optimizer": name} for name in TORCH_OPTIMIZERS if name != "sgd"),
    {"optimizer": "sgd:momentum=0.9,nesterov=true"},
    {"optimizer": "adam:amsgrad=true", "decay-biases-and-norms": False},
    {"optimizer": "rmsprop:momentum=0.9,centered=true"},
]


def named(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def take(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        set_lr(optimizer, 0.01 / (1 + step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("keys", EVERY)
def test_a_state_loaded_into_another_optimizer_continues_bitwise(keys: dict[str, Any]) -> None:
    config = Config().changed(keys)
    model = build_model("lenet5", 10, 0)
    optimizer = build_optimizer(config, named(model))
    take(model, optimizer, range(3))
    state = optimizer_state(named(model), optimizer)
    assert state
    other = copy.deepcopy(model)
    other_optimizer = build_optimizer(config, named(other))
    load_optimizer_state(named(other), other_optimizer, state)
    take(model, optimizer, range(3, 6))  # first, so that a shared buffer would show
    take(other, other_optimizer, range(3, 6))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("keys", EVERY)
def test_zero_state_is_a_new_optimizers(keys: dict[str, Any]) -> None:
    config = Config().changed(keys)
    models = [build_model("lenet5", 10, 0) for _ in range(2)]
    optimizers = [build_optimizer(config, named(model)) for model in models]
    load_optimizer_state(named(models[1]), optimizers[1], zero_state(config, named(models[1])))
    for model, optimizer in zip(models, optimizers, strict=True):
        take(model, optimizer, range(3))
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_groups_decay_all_or_matrices_alone() -> None:
    model = build_model("lenet-bn", 10, 0)
    (every,) = build_optimizer(Config(weight_decay=0.1, decay_biases_and_norms=True), named(model)).param_groups
    assert every["weight_decay"] == 0.1
    assert len(every["params"]) == len(list(model.parameters()))
    decayed, undecayed = build_optimizer(
        Config(weight_decay=0.1, decay_biases_and_norms=False), named(model)
    ).param_groups
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0)
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in undecayed["params"]} == {1}


def test_fused_sgdm_is_momentum_as_it_is_written() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    module = nn.Module()
    module.weight = parameter
    optimizer = build_optimizer(Config(lr=0.1, momentum=0.5, weight_decay=0.2), named(module))
    weight, buffer = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for gradient in (torch.tensor([3.0, 1.0]), torch.tensor([-1.0, 2.0])):
        parameter.grad = gradient.double()
        optimizer.step()
        buffer = 0.5 * buffer + gradient.double() + 0.2 * weight
        weight = weight - 0.1 * buffer
    torch.testing.assert_close(parameter.data, weight, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("backend", "lars_class", "lamb_class"),
    [("fedsim", LARS, LAMB), ("torch-optimizer", torch_optimizer.LARS, torch_optimizer.Lamb)],
)
def test_lars_and_lamb_take_our_keys(backend: Any, lars_class: type, lamb_class: type) -> None:
    model = build_model("lenet5", 10, 0)
    config = Config(optimizer=f"lars:trust=0.05,nesterov=true,backend={backend}")
    lars = build_optimizer(config, named(model))
    assert type(lars) is lars_class
    assert (lars.param_groups[0]["trust_coefficient"], lars.param_groups[0]["nesterov"]) == (0.05, True)
    lamb = build_optimizer(Config(optimizer=f"lamb:betas=0.8/0.9,backend={backend}"), named(model))
    assert type(lamb) is lamb_class
    assert (lamb.param_groups[0]["betas"], lamb.param_groups[0]["eps"]) == ((0.8, 0.9), 1e-6)


@pytest.mark.parametrize("optimizer", ["lars:trust=0.1", "lamb:clamp=10"])
def test_both_backends_train_alike(optimizer: Any) -> None:
    weights = []
    for backend in ("fedsim", "torch-optimizer"):
        model = build_model("lenet5", 10, 0)
        config = Config(optimizer=f"{optimizer},backend={backend}", decay_biases_and_norms=False)
        take(model, build_optimizer(config, named(model)), range(10))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


def test_the_papers_switches_reach_fedsims_optimizers() -> None:
    model = build_model("lenet5", 10, 0)
    (group,) = build_optimizer(Config(optimizer="lars:lr-in-momentum=true"), named(model)).param_groups
    assert (group["lr_in_momentum"], group["adapt_undecayed"]) == (True, False)
    config = Config(
        optimizer="lamb:bias-correction=moments,clamp=0,adapt-undecayed=false", decay_biases_and_norms=False
    )
    group, _ = build_optimizer(config, named(model)).param_groups
    assert (group["bias_correction"], group["clamp_value"], group["adapt_undecayed"]) == ("moments", None, False)


@pytest.mark.parametrize("keys", EVERY)
def test_an_empty_state_resets(keys: dict[str, Any]) -> None:
    config = Config().changed(keys)
    model = build_model("lenet5", 10, 0)
    optimizer = build_optimizer(config, named(model))
    take(model, optimizer, range(2))
    load_optimizer_state(named(model), optimizer, {})
    other = copy.deepcopy(model)
    take(model, optimizer, range(2))
    take(other, build_optimizer(config, named(other)), range(2))
    for one, another in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, another)


@pytest.mark.parametrize("keys", EVERY)
def test_a_state_is_loaded_in_place(keys: dict[str, Any]) -> None:
    """A CUDA graph holds the tensors themselves."""
    model = build_model("lenet5", 10, 0)
    optimizer = build_optimizer(Config().changed(keys), named(model))
    take(model, optimizer, range(1))
    state = optimizer_state(named(model), optimizer)

    def places() -> list[int]:
        held = [value for entries in optimizer.state.values() for value in entries.values()]
        return [value.data_ptr() for value in held if isinstance(value, Tensor)]

    before = places()
    for loaded in (state, {}):
        load_optimizer_state(named(model), optimizer, loaded)
        assert places() == before
