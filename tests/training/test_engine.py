from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.models.lenet import LeNet5
from fedsim.training.engine import choose_engine, multiply_adds
from tests.conftest import register


def test_multiply_adds_are_those_of_convolutions_and_fully_connected_layers(small: Config) -> None:
    convolutions = 6 * 28 * 28 * 3 * 25 + 16 * 10 * 10 * 6 * 25
    assert multiply_adds(small) == convolutions + 400 * 120 + 120 * 84 + 84 * 10


@pytest.mark.parametrize(
    ("keys", "engine"),
    [
        ({"batch-size": 64, "clients": 12}, "stacked"),
        ({"batch-size": 64, "clients": 12, "device": "cuda"}, "stacked"),
        ({"batch-size": 64, "clients": 12, "model": "lenet-bn"}, "threads"),
        ({"batch-size": 64, "clients": 12, "model": "lenet-bn", "device": "cuda"}, "stacked"),
        ({"batch-size": 1024, "clients": 12}, "threads"),
        ({"batch-size": 64, "clients": 12, "fraction": 0.1}, "threads"),
    ],
)
def test_small_steps_are_stacked(small: Config, keys: dict[str, Any], engine: str) -> None:
    assert choose_engine(small.changed(keys)) == engine


def test_a_model_that_cannot_be_stacked_runs_on_threads(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reversed(LeNet5):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flip(3))

    register(monkeypatch, "lenet5", Reversed)
    assert choose_engine(small) == "threads"


def test_the_model_is_tried_on_one_thread(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    used: set[int] = set()

    class Watched(LeNet5):
        def forward(self, x: Tensor) -> Tensor:
            used.add(torch.get_num_threads())
            return super().forward(x)

    register(monkeypatch, "lenet5", Watched)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert choose_engine(small) == "stacked"
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert (used, after) == ({1}, 3)
