"""What a GPU adds, by ``pytest -m gpu`` on a machine with one: captured steps, all workers at once, resumed runs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from fedsim.config import Config
from fedsim.data.image_sets import facts_of
from fedsim.device import prepare
from fedsim.experiments.execute import execute
from fedsim.models import build_model
from fedsim.training import local_round
from fedsim.training.local_round import RoundStart
from tests.conftest import NEEDS_GPU, assert_same_bits, final_model, rows_of
from tests.training import test_stacked as stacked_tests
from tests.training.test_cuda_graph import OPTIMIZERS, assert_close, rounds
from tests.training.test_stacked import NOISE_OF_LAMB, WAYS, assert_same_rounds

pytestmark = [pytest.mark.gpu, NEEDS_GPU]


@pytest.fixture
def on_gpu(small: Config) -> Config:
    config = small.changed({"device": "cuda", "model": "lenet-bn", "dataset.images": 256})
    prepare(config)
    return config


@pytest.mark.parametrize("keys", OPTIMIZERS)
def test_a_captured_step_is_the_step(on_gpu: Config, keys: dict[str, Any]) -> None:
    """BN, dropout, new and kept states, a smaller last batch; all but the rates' rounding are in both."""
    config = on_gpu.changed(keys)
    captured = rounds(config, static=True, capture=True)
    assert_close(captured, rounds(config, static=True), 1e-6)
    simple = rounds(config, static=False)
    if config.optimizer in ("lamb", "adamw"):
        captured, simple = ({k: v for k, v in r.items() if k not in NOISE_OF_LAMB} for r in (captured, simple))
    assert_close(captured, simple, 1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("keys", stacked_tests.OPTIMIZERS)
def test_all_at_once_is_one_by_one(on_gpu: Config, way: str, keys: dict[str, Any]) -> None:
    config = on_gpu.changed({"precision": "fp64", **keys})
    assert_same_rounds(config, WAYS[way], NOISE_OF_LAMB if config.optimizer == "lamb" else ())


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_steps_wait_for_nothing(on_gpu: Config, precision: str) -> None:
    config = on_gpu.changed({"precision": precision})
    start = RoundStart(0, 1, build_model(config.model, facts_of(config).classes, 0, config.device).state_dict(), {})
    local_round.take_local_round(config, start)
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that this mode is experimental
            torch.cuda.set_sync_debug_mode("error")
        loss = local_round.take_local_round(config, start).loss
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 < float(loss) < 10


@pytest.mark.parametrize(("mode", "engine"), [("localsgd", "local"), ("localsgd", "stacked"), ("centralized", "local")])
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


@pytest.mark.parametrize("engine", ["local", "stacked"])
@pytest.mark.parametrize("codec", ["topk", "powersgd"])
def test_the_servers_and_the_clients_memories_are_resumed_bitwise(on_gpu: Config, engine: Any, codec: str) -> None:
    """Outer Adam, residuals, and rounds of several lengths."""
    rounds = {"local-steps-schedule": "doubling:max=4", "record-by": "epoch", "epochs": 4.0}
    config = on_gpu.changed({"outer": "fedadam:lr=0.01", "compress": codec, **rounds})
    whole = execute(config.changed({"name": "whole"}), "localsgd", engine)
    execute(config.changed({"name": "parts", "stop-after-epochs": 2.0}), "localsgd", engine)
    parts = execute(config.changed({"name": "parts"}), "localsgd", engine)
    assert_same_bits(final_model(parts), final_model(whole))
    assert rows_of(parts) == rows_of(whole)
