"""Outer optimizers: reductions to known cases, hand-computed steps, and state that is resumed bit for bit."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from strategies.errors import StrategyFailed
from strategies.method import State
from strategies.outer import OUTER, outer_step

LR = 0.05


def values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv.weight": (3, 2, 2), "fc.bias": (5,)}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def means(rounds: int) -> list[dict[str, Tensor]]:
    """What the workers' mean is in each round."""
    return [values(seed) for seed in range(1, rounds + 1)]


def run(name: str, rounds: int = 4, rates: list[float] | None = None, **arguments: Any) -> dict[str, Tensor]:
    """The parameters after `rounds` outer steps from zero."""
    step = outer_step(name, **arguments)
    state: State = {}
    x = {n: torch.zeros_like(v) for n, v in values(0).items()}
    for mean, lr in zip(means(rounds), rates or [LR] * rounds, strict=True):
        x, state = step(x, mean, state, lr)
    return x


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("none", {}),
        ("sgd", {}),
        ("fedavgm", {"momentum": 0.0}),
        ("slowmo", {"momentum": 0.0}),
        ("diloco", {"lr": 1.0, "momentum": 0.0, "nesterov": False}),
    ],
)
def test_at_its_identity_it_is_the_mean_itself(name: str, arguments: dict[str, Any]) -> None:
    assert all(torch.equal(value, means(4)[-1][n]) for n, value in run(name, **arguments).items())


def test_slowmo_without_momentum_is_averaging_at_any_rates() -> None:
    step = outer_step("slowmo", momentum=0.0, dampening=1e-300)  # not bypassed as the identity
    x, state = values(0), dict[str, Any]()
    for round_, rate in enumerate((0.003, 0.5, 0.0, 1e-5), 1):
        mean = values(round_)
        x, state = step(x, mean, state, rate)
        assert distance(x, mean) < 1e-14


def test_slowmo_at_a_constant_rate_is_fedavgm() -> None:
    assert distance(run("slowmo", lr=0.8, momentum=0.6), run("fedavgm", lr=0.8, momentum=0.6)) < 1e-14


def test_slowmo_at_a_decaying_rate_is_its_papers_formula() -> None:
    """u = beta * u + (x - mean) / lr, x = x - alpha * lr * u; where the rate is 0 the mean is taken and u kept."""
    rates, alpha, beta = [0.1, 0.05, 0.0, 0.02], 0.7, 0.5
    x = {n: torch.zeros_like(v) for n, v in values(0).items()}
    u = {n: torch.zeros_like(v) for n, v in values(0).items()}
    for mean, lr in zip(means(4), rates, strict=True):
        for n in x:
            if lr:
                u[n] = beta * u[n] + (x[n] - mean[n]) / lr
            x[n] = x[n] - alpha * lr * u[n] if lr else mean[n]
    assert distance(run("slowmo", rates=rates, lr=alpha, momentum=beta), x) < 1e-13


def test_diloco_is_nesterovs_momentum_by_hand() -> None:
    x = {n: torch.zeros_like(v) for n, v in values(0).items()}
    buffer: dict[str, Tensor] = {}
    for mean in means(4):
        for n in x:
            gradient = x[n] - mean[n]
            buffer[n] = 0.9 * buffer[n] + gradient if n in buffer else gradient
            x[n] = x[n] - 0.7 * (gradient + 0.9 * buffer[n])
    assert distance(run("diloco"), x) < 1e-14


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
def test_fedadam_and_fedyogi_are_their_papers_formulas(name: str) -> None:
    """Reddi et al. 2021, Algorithm 2, which has no bias correction; from v = 0."""
    x = {n: torch.zeros_like(v) for n, v in values(0).items()}
    m, v = ({n: torch.zeros_like(value) for n, value in x.items()} for _ in range(2))
    for mean in means(4):
        for n in x:
            delta = mean[n] - x[n]
            m[n] = 0.9 * m[n] + 0.1 * delta
            if name == "fedadam":
                v[n] = 0.99 * v[n] + 0.01 * delta**2
            else:
                v[n] = v[n] - 0.01 * delta**2 * torch.sign(v[n] - delta**2)
            x[n] = x[n] + 0.1 * m[n] / (v[n].sqrt() + 1e-3)
    assert distance(run(name, lr=0.1), x) < 1e-14


@pytest.mark.parametrize(
    ("name", "arguments", "other", "others"),
    [
        ("fedadam", {"lr": 0.1}, "adam", {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3}),
        ("fedyogi", {"lr": 0.1}, "yogi", {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3, "initial_accumulator": 0.0}),
    ],
)
def test_with_bias_correction_they_are_the_libraries(
    name: str, arguments: dict[str, Any], other: str, others: dict[str, Any]
) -> None:
    """torch.optim.Adam and torch_optimizer.Yogi."""
    corrected, library = run(name, bias_correction=True, **arguments), run(other, **others)
    assert distance(corrected, library) < 1e-14
    assert distance(run(name, **arguments), library) > 1e-3


def test_the_state_of_another_optimizer_is_refused() -> None:
    """As a checkpoint holds where FedAdam was torch.optim.Adam."""
    _, state = outer_step("adam")(values(0), values(1), {}, LR)
    with pytest.raises(StrategyFailed, match="the server's state is of another optimizer: give --rerun"):
        outer_step("fedadam")(values(0), values(1), state, LR)


def test_an_outer_step_goes_towards_the_mean() -> None:
    """The sign of the pseudo-gradient: other systems have had it wrong."""
    for name in ("fedavgm", "slowmo", "diloco", "fedadam", "fedyogi", "fedadagrad"):
        x, mean = {"w": torch.zeros(3, dtype=torch.float64)}, {"w": torch.ones(3, dtype=torch.float64)}
        assert float(outer_step(name)(x, mean, {}, LR)[0]["w"].min()) > 0, name


@pytest.mark.parametrize("name", [name for name in OUTER if name != "none"])
def test_its_state_is_resumed_bit_for_bit(name: str) -> None:
    """Through a checkpoint that torch.load reads with weights_only; nothing that was passed in is changed."""
    step = outer_step(name, momentum=0.9) if name == "sgd" else outer_step(name)
    x = values(0)
    state: State = {}
    for mean in means(2):
        before = {n: v.clone() for n, v in x.items()}
        following, state = step(x, mean, state, LR)
        assert all(torch.equal(before[n], x[n]) for n in x)
        x = following
    file = io.BytesIO()
    torch.save({"x": x, "state": state}, file)
    file.seek(0)
    resumed: tuple[dict[str, Tensor], State] = tuple(torch.load(file, weights_only=True).values())
    for mean in means(4)[2:]:
        x, state = step(x, mean, state, LR)
        resumed = step(resumed[0], mean, resumed[1], LR)
    assert all(torch.equal(x[n], resumed[0][n]) for n in x)
    assert state


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("sdg", {}, "sdg is unknown: it must be one of none, fedavgm"),
        ("none", {"lr": 1.0}, "none takes no arguments"),
        ("diloco", {"mu": 0.9}, "diloco has no argument mu: it must be one of lr, momentum"),
        ("fedadam", {"lr": -1.0}, "fedadam: Invalid learning rate"),
        ("fedyogi", {"eps": -1.0}, "fedyogi: Invalid eps: -1"),
        ("fedadam", {"betas": (0.9, 1.0)}, r"fedadam: Invalid betas: \(0.9, 1.0\)"),
        ("fedadam", {"betas": 0.9}, "betas = 0.9 must be 2 numbers with a / between"),
        ("adam", {"betas": (0.9, 0.9, 0.9)}, "betas = 0.9/0.9/0.9 must be 2 numbers with a / between"),
        ("sgd", {"nesterov": True}, "sgd: Nesterov momentum requires a momentum"),
    ],
)
def test_what_it_does_not_know_is_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        outer_step(name, **arguments)
