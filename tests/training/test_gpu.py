"""What a GPU adds, by ``pytest -m gpu`` on a machine with one: captured steps, the fused fleet, runs that go on."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from fedsim.config import Config
from fedsim.device import prepare
from fedsim.experiments.execute import execute
from fedsim.models import build_model
from fedsim.training import local_round
from fedsim.training import stacked as fused
from fedsim.training.local_round import Start
from tests.conftest import NEEDS_GPU, assert_same_bits, final_model, rows_of
from tests.training.test_cuda_graph import OPTIMIZERS, assert_close, rounds
from tests.training.test_stacked import NOISE_OF_LAMB, begin, difference

pytestmark = [pytest.mark.gpu, NEEDS_GPU]
WAYS = ["groups", "products", "streams"]


@pytest.fixture
def on_gpu(small: Config) -> Config:
    config = small.changed({"device": "cuda", "model": "lenet-bn", "synthetic-images": 256})
    prepare(config)
    return config


@pytest.mark.parametrize("keys", OPTIMIZERS)
def test_a_captured_step_is_the_step(on_gpu: Config, keys: dict[str, Any]) -> None:
    """BN, dropout, new and kept states, a smaller last batch; all but the rates' rounding are in both."""
    config = on_gpu.changed(keys)
    captured = rounds(config, static=True, capture=True)
    assert_close(captured, rounds(config, static=True), 1e-6)
    simple = rounds(config, static=False)
    if config.optimizer == "lamb":
        captured, simple = ({k: v for k, v in r.items() if k not in NOISE_OF_LAMB} for r in (captured, simple))
    assert_close(captured, simple, 1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "keys",
    [
        {"optimizer": "sgdm"},
        {"optimizer": "lars", "decay-on": "matrices", "trust-coefficient": 0.05},
        {"optimizer": "lamb", "decay-on": "matrices"},
    ],
)
def test_the_fused_fleet_is_the_loop(
    on_gpu: Config, way: str, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "WAY", way)
    config = on_gpu.changed({"precision": "fp64", **keys})
    starts = [begin(config, worker) for worker in (3, 0, 2)]
    for _ in range(2):
        alone = [local_round.take_round(config, start) for start in starts]
        for one, other in zip(alone, fused.take_rounds(config, starts), strict=True):
            assert difference(one, other, NOISE_OF_LAMB if config.optimizer == "lamb" else ()) < 1e-12
            assert one.loss == pytest.approx(other.loss, abs=1e-12)
        starts = [Start(s.worker, 2, end.weights, end.state) for s, end in zip(starts, alone, strict=True)]


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_steps_wait_for_nothing(on_gpu: Config, precision: str) -> None:
    config = on_gpu.changed({"precision": precision})
    replica = local_round.build_replica(config)
    start = Start(0, 1, build_model(config.model, config.synthetic_classes, 0, config.device).state_dict(), {})
    local_round.train_replica(config, replica, start)
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():  # that this mode is experimental
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        _, _, loss = local_round.train_replica(config, replica, start)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 < float(loss) < 10


@pytest.mark.parametrize(("mode", "engine"), [("localsgd", "fleet"), ("localsgd", "fused"), ("centralized", "fleet")])
@pytest.mark.parametrize("optimizer", ["sgdm", "lars", "lamb"])
def test_stopped_and_resumed_is_never_stopped_bitwise(on_gpu: Config, mode: Any, engine: Any, optimizer: str) -> None:
    config = on_gpu.changed({"optimizer": optimizer, "batch-size": 24, "schedule": "cosine"})
    whole = execute(config.changed({"name": "whole"}), mode, engine)
    stop = {"stop-after-epochs": 1.0}
    execute(config.changed({"name": "parts", **stop}), mode, engine)
    parts = execute(config.changed({"name": "parts"}), mode, engine)
    assert_same_bits(final_model(parts), final_model(whole))
    assert rows_of(parts) == rows_of(whole)


@pytest.mark.parametrize("optimizer", ["sgdm", "lars", "lamb"])
def test_one_client_is_centralized_training(on_gpu: Config, optimizer: str) -> None:
    config = on_gpu.changed({"optimizer": optimizer, "clients": 1, "local-steps": 5})
    local = execute(config.changed({"name": "local"}), "localsgd")
    central = execute(config.changed({"name": "central"}), "centralized")
    assert_same_bits(final_model(local), final_model(central))
