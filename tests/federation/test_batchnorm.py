"""The rules of BatchNorm's statistics within a run; their formulas are tested in tests/strategies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.registry import BATCHNORM, MODELS
from fedsim.runs.run import Run
from tests.conftest import Execute, assert_same_bits, final_model, rows_of
from tests.federation.equal_runs import stopped_and_resumed
from tests.federation.test_failures import forget, once, run_with

RULES = BATCHNORM.names


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS.places, "lenet-bn", f"{__name__}:tiny_network")


def tiny_network(classes: int) -> nn.Module:
    """A network with BatchNorm that trains in no time."""
    return nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(196, classes))


def model_of(run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters and the statistics of the final model."""
    state = final_model(run)
    statistics = {name for name in state if "running" in name or "tracked" in name}
    assert len(statistics) == 3
    return {n: state[n] for n in state.keys() - statistics}, {n: state[n] for n in statistics}


def test_one_client_makes_all_rules_equal_bitwise(run: Execute) -> None:
    keys = {"model": "lenet-bn", "clients": 1, "rounds": 4}
    average = run(name="average", **keys)
    for rule in ("first-worker", "pooled", "local"):
        other = run(name=rule, batchnorm_at_sync=rule, **keys)
        assert_same_bits(final_model(other), final_model(average))
        assert rows_of(other) == rows_of(average)


def test_the_rules_differ_in_statistics_alone(run: Execute) -> None:
    """Training normalizes by the statistics of the batch, so that the parameters are the same bit for bit."""
    runs = {rule: run(name=rule, batchnorm_at_sync=rule, model="lenet-bn", rounds=4, fraction=0.5) for rule in RULES}
    parameters, average = model_of(runs["average"])
    for rule in RULES[1:]:
        own, statistics = model_of(runs[rule])
        assert_same_bits(own, parameters)
        assert not torch.equal(statistics["1.running_var"], average["1.running_var"]), rule
    assert (model_of(runs["pooled"])[1]["1.running_var"] > average["1.running_var"]).all()
    assert not torch.equal(*(model_of(runs[rule])[1]["1.running_var"] for rule in ("local", "first-worker")))


def test_where_all_take_part_local_statistics_are_the_first_workers(run: Execute) -> None:
    """Worker 0 continues from its own in both; what a checkpoint needs is sent besides."""
    keys: dict[str, Any] = {"model": "lenet-bn", "rounds": 4}
    local, first = (run(name=rule, batchnorm_at_sync=rule, **keys) for rule in ("local", "first-worker"))
    assert_same_bits(final_model(local), final_model(first))
    assert rows_of(local) == rows_of(first)
    memories = torch.load(local.folder / "checkpoint.pt", weights_only=True)["memories"]
    own = [memories[worker]["batchnorm/1.running_mean"] for worker in range(4)]
    assert torch.equal(own[0], final_model(local)["1.running_mean"])
    assert not torch.equal(own[0], own[1])


@pytest.mark.parametrize("rule", ["local", "re-estimated"])
def test_resumed_or_rolled_back_it_is_the_same_run_bitwise(small: Config, run: Execute, rule: str) -> None:
    keys: dict[str, Any] = {"model": "lenet-bn", "batchnorm-at-sync": rule, "momentum-at-sync": "reset"}
    keys |= {"rounds": 6, "fraction": 0.5, "checkpoint-every": 2, "precision": "fp64"}
    stopped_and_resumed(run, keys)
    if rule == "local":
        keys |= {"fraction": 1.0, "min-clients": 4}
        whole = run(name="all", **keys)
        lost = run_with(once(5, 2, forget), small.changed({**keys, "name": "lost"}))
        assert rows_of(lost) == rows_of(whole)
        memories = [torch.load(one.folder / "checkpoint.pt", weights_only=True)["memories"] for one in (whole, lost)]
        for worker in range(4):
            assert_same_bits(memories[1][worker], memories[0][worker])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"batchnorm_at_sync": "average:images=100"},
            "average has no argument images: it takes none",
        ),
        ({"batchnorm_at_sync": "pooled", "mean": "median"}, "give --mean exact, or --batchnorm-at-sync average"),
        (
            {"batchnorm_at_sync": "local", "mean": "clipped"},
            "mean = clipped: batchnorm-at-sync = local needs the exact mean of",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(run: Execute, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(**keys)
    assert not list(tmp_path.iterdir())
