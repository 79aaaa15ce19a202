"""The workers of a round at once are the workers one by one: in float64 to 1e-12, by every way, for every optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fedsim.config import Config
from fedsim.device import resolve
from fedsim.experiments.execute import execute
from fedsim.models import build_model
from fedsim.training import local_round
from fedsim.training import stacked as fused
from fedsim.training.local_round import End, Start
from tests.conftest import final_model, rows_of


def begin(config: Config, worker: int, round: int = 1) -> Start:
    """Every worker from weights of its own, so that a mix-up would show."""
    model = build_model(config.model, config.synthetic_classes, worker, precision=config.precision)
    return Start(worker, round, model.state_dict(), {})


# LAMB steps by the norm of a parameter even where its gradient is rounding noise, as that of a bias before BN is. BN
# takes the bias out of everything but its running mean; how other kernels round decides on both.
NOISE_OF_LAMB = ("conv1.bias", "conv2.bias", "bn1.running_mean", "bn2.running_mean")


def difference(one: End, other: End, but: Sequence[str] = ()) -> float:
    assert one.weights.keys() == other.weights.keys()
    assert one.state.keys() == other.state.keys()
    pairs = [(one.weights[name], other.weights[name]) for name in one.weights if name not in but]
    pairs += [(one.state[name], other.state[name]) for name in one.state]
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("way", ["groups", "products", "streams"])
@pytest.mark.parametrize("model", ["lenet-bn", "lenet5"])
@pytest.mark.parametrize(
    "keys",
    [
        {"optimizer": "sgdm"},
        {"optimizer": "sgdm", "momentum": 0.0},
        {"optimizer": "sgdm", "nesterov": True, "decay-on": "matrices"},
        {"optimizer": "lars", "decay-on": "matrices", "trust-coefficient": 0.05},
        {"optimizer": "lamb", "decay-on": "matrices"},
        {"optimizer": "lars", "decay-on": "matrices", "optimizer-backend": "torch-optimizer"},
        {"optimizer": "lamb", "decay-on": "matrices", "optimizer-backend": "torch-optimizer"},
    ],
)
def test_all_at_once_is_one_by_one(
    small: Config, way: str, model: str, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "WAY", way)
    config = resolve(small.changed({"model": model, "precision": "fp64", **keys}), "localsgd")
    noise = NOISE_OF_LAMB if (config.optimizer, model) == ("lamb", "lenet-bn") else ()
    starts = [begin(config, worker) for worker in (3, 0, 2)]
    for _ in range(2):  # the second round goes on from the state of the first
        alone = [local_round.take_round(config, start) for start in starts]
        together = fused.take_rounds(config, starts)
        for one, other in zip(alone, together, strict=True):
            assert difference(one, other, noise) < 1e-12
            assert one.loss == pytest.approx(other.loss, abs=1e-12)
            assert one.samples == other.samples
        starts = [Start(s.worker, 2, end.weights, end.state) for s, end in zip(starts, alone, strict=True)]


def test_a_mix_up_of_workers_would_be_seen(small: Config) -> None:
    config = resolve(small.changed({"precision": "fp64"}), "localsgd")
    alone = local_round.take_round(config, begin(config, 0))
    (other, _) = fused.take_rounds(config, [begin(config, 1), begin(config, 0)])
    assert difference(alone, other) > 1e-3


@pytest.mark.parametrize("momentum_at_sync", ["keep", "average"])
def test_a_whole_run_of_the_fused_fleet_is_that_of_the_loop(small: Config, momentum_at_sync: str) -> None:
    keys = {"model": "lenet-bn", "precision": "fp64", "momentum-at-sync": momentum_at_sync, "synthetic-images": 256}
    config = resolve(small.changed(keys), "localsgd")
    loop = execute(config.changed({"name": "loop"}), "localsgd", "fleet")
    together = execute(config.changed({"name": "fused"}), "localsgd", "fused")
    for name, value in final_model(loop).items():
        torch.testing.assert_close(value, final_model(together)[name], rtol=0, atol=1e-11)
    assert [row["test_accuracy"] for row in rows_of(loop)] == [row["test_accuracy"] for row in rows_of(together)]
    assert final_model(loop)["fc1.weight"].dtype == torch.float64


def test_in_single_precision_they_differ_by_rounding_alone(small: Config) -> None:
    config = resolve(small.changed({"model": "lenet-bn", "local-steps": 1}), "localsgd")
    starts = [begin(config, worker) for worker in (0, 1)]
    pairs = zip([local_round.take_round(config, s) for s in starts], fused.take_rounds(config, starts), strict=True)
    assert max(difference(one, other) for one, other in pairs) < 1e-5
