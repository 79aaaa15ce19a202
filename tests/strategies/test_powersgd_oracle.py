"""PowerSGD against PyTorch's own, a hook of data-parallel training."""

from __future__ import annotations

import numpy as np
import torch
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from strategies.compression import PowerSGD
from strategies.wire import decode, encode


def test_powersgd_of_one_worker_is_torchs() -> None:
    """PyTorch's hook for data-parallel training, of one process: with more, it factors the mean of all workers."""
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        layer = torch.nn.Linear(9, 12, bias=False, dtype=torch.float64)
        model = torch.nn.parallel.DistributedDataParallel(layer)
        state = PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=1)
        model.register_comm_hook(state, powerSGD_hook)
        torch.manual_seed(int(np.random.RandomState(0).randint(1_000_000_000)))
        memory = {"warm-start/w": torch.randn(9, 2, dtype=torch.float64)}
        for step in range(6):
            gradient = torch.randn(12, 9, dtype=torch.float64)
            model.zero_grad()
            (model(torch.eye(9, dtype=torch.float64)).T * gradient).sum().backward()
            assert layer.weight.grad is not None
            if step < 2:  # the hook does not compress yet
                assert torch.equal(layer.weight.grad, gradient)
                continue
            message, memory = encode(PowerSGD(2), {"w": gradient}, memory, seed=0)
            ours = decode(PowerSGD(2), message, {"w": gradient}, seed=0)["w"]
            torch.testing.assert_close(layer.weight.grad, ours, rtol=0, atol=1e-13)
            assert float((ours - gradient).abs().max()) > 0.1
    finally:
        torch.distributed.destroy_process_group()
