from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from fedsim.models import build_model
from fedsim.optim.torch_optimizers import TORCH_OPTIMIZERS

ROUND = """
import sys
import torch
from fedsim.federation.client_app import app
from fedsim.config import Config
from fedsim.data.datasets import load_dataset
from fedsim.training.local_round import RoundStart, take_local_round
from fedsim.device import resolve
from fedsim.models import build_model
for optimizer in sys.argv[2:]:
    keys = {"dataset": sys.argv[1], "model": "lenet5", "optimizer": optimizer, "batch-size": 16, "device": "cpu"}
    config = resolve(Config().changed(keys), "localsgd")
    take_local_round(config, RoundStart(0, 1, build_model("lenet5", load_dataset(config).classes, 0).state_dict(), {}))
print(*sys.modules)
"""
NOT_NEEDED = {"torchvision", "torch_optimizer", "torch._dynamo", "sympy", "matplotlib", "timm", "psutil", "ray"}


def test_a_round_in_a_new_process_loads_only_what_it_needs() -> None:
    command = [sys.executable, "-c", ROUND, "synthetic:images=64", "sgdm", "lars", "lamb", "adamw", "nadam"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout.split()
    assert not NOT_NEEDED & set(done.stdout.split())


@pytest.mark.parametrize(
    "keys", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"fused": True}]
)
def test_sgdm_is_torchs_sgd_bitwise(keys: dict[str, Any]) -> None:
    weights = []
    for kind in (TORCH_OPTIMIZERS["sgd"], torch.optim.SGD):
        model = build_model("lenet5", 10, 0)
        optimizer = kind([{"params": list(model.parameters()), "lr": 0.1}], lr=0.01, **keys)
        for step in range(3):
            optimizer.zero_grad()
            assert all(parameter.grad is None for parameter in model.parameters())
            model(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(*weights)
