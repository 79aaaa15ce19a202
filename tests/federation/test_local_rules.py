"""Local rules and PyTorch's optimizers within a run; the rules by themselves: tests/strategies/test_local_rules.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.config import Config, Mode
from fedsim.errors import UserError
from fedsim.federation import client_app
from fedsim.federation.protocol import MEMORY_LOST
from fedsim.runs.records import read_rows
from fedsim.training.local_round import RoundEnd, RoundStart, take_local_round
from tests.conftest import Execute, assert_same_bits, final_model, rows_of
from tests.federation.equal_runs import resumed_and_pickled
from tests.federation.test_failures import UPDATE, fail, forget, once, run_with

PLAIN_SGD = {"momentum": 0.0, "weight-decay": 0.0}


@pytest.mark.parametrize("keys", [{"local-rule.mu": 0}, {"local-rule.mu": 1.0, "local_steps": 1}])
def test_without_a_distance_fedprox_is_the_plain_run_bitwise(run: Execute, keys: dict[str, Any]) -> None:
    steps = {name: value for name, value in keys.items() if name == "local_steps"}
    plain, proximal = run(name="plain", epochs=1.0, **steps), run(name="prox", epochs=1.0, local_rule="fedprox", **keys)
    assert_same_bits(final_model(proximal), final_model(plain))
    assert rows_of(proximal) == rows_of(plain)


@pytest.mark.parametrize(
    ("rule", "keys"),
    [
        ("scaffold", {"optimizer": "adamw:betas=0.8/0.9"}),
        ("scaffold", {"optimizer.nesterov": True}),
        ("scaffold-inferred", {"momentum": 0.0, "weight_decay": 0.0}),
        ("none", {"optimizer": "nadam", "momentum_at_sync": "average", "decay_biases_and_norms": False}),
    ],
)
def test_one_client_is_centralized_training_bitwise(run: Execute, rule: str, keys: dict[str, Any]) -> None:
    schedule = {"epochs": 1.0, "schedule": "cosine", "lr": 0.001, **keys}
    local = run(name="local", clients=1, local_steps=4, local_rule=rule, **schedule)
    central = run("centralized", name="central", **schedule)
    assert_same_bits(final_model(local), final_model(central))


@pytest.mark.parametrize(
    "keys",
    [
        {"local-rule": "scaffold", "momentum-at-sync": "reset"},
        {"local-rule": "scaffold", "fraction": 0.5, "optimizer": "adamw", "lr": 0.001, "compress": "topk"},
        {"local-rule": "fedprox", "momentum-at-sync": "average", "optimizer": "adafactor", "lr": 0.001},
        {"local-rule": "scaffold-inferred", **PLAIN_SGD, "schedule": "cosine"},
        {"local-rule": "feddyn:alpha=0.1", "momentum-at-sync": "reset"},
        {
            **{"local-rule": "fednova", "momentum-at-sync": "reset", "outer": "fedexp", "fraction": 0.5, "lr": 0.01},
            **{"test-model": "ema:decay=0.5", "compress": "topk:ratio=0.1+int8"},
        },
    ],
)
def test_resumed_and_pickled_it_is_the_same_run_bitwise(small: Config, run: Execute, keys: dict[str, Any]) -> None:
    keys = {"rounds": 5, "checkpoint-every": 2, "clients": 4 if "fraction" in keys else 2, **keys}
    whole = resumed_and_pickled(small, run, keys).whole
    without = run(name="without", **{**keys, "local-rule": "none"})
    assert not torch.equal(final_model(without)["fc3.weight"], final_model(whole)["fc3.weight"])


@pytest.mark.parametrize("rule", [{"local_rule": "scaffold"}, {"local_rule": "scaffold-inferred"}])
def test_identical_clients_need_no_correction(
    run: Execute, monkeypatch: pytest.MonkeyPatch, rule: dict[str, Any]
) -> None:
    """Their c_k is c: the run is the plain one, bit for bit."""

    def of_worker_0(config: Config, start: RoundStart) -> RoundEnd:
        return take_local_round(config, dataclasses.replace(start, worker=0))

    monkeypatch.setattr(client_app, "take_local_round", of_worker_0)
    keys = {"clients": 3, "rounds": 3, "momentum": 0.0, "weight_decay": 0.0}
    plain, corrected = run(name="plain", **keys), run(name="corrected", **keys, **rule)
    assert_same_bits(final_model(corrected), final_model(plain))


@pytest.mark.parametrize("codec", ["int8", "topk", "sign"])
def test_identical_clients_are_one_client_bitwise(run: Execute, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    """Whatever they send: the mean of equal updates is the update, and so are the residuals."""

    def of_worker_0(config: Config, start: RoundStart) -> RoundEnd:
        return take_local_round(config.changed({"clients": 1}), dataclasses.replace(start, worker=0))

    monkeypatch.setattr(client_app, "take_local_round", of_worker_0)
    keys = {"rounds": 3, "compress": codec, "local_rule": "fedprox:mu=0.1"}
    one, three = run(name="one", clients=1, **keys), run(name="three", clients=3, **keys)
    assert_same_bits(final_model(three), final_model(one))


def test_scaffold_sends_twice_the_bytes_both_ways(run: Execute) -> None:
    for kept in ("reset", "keep"):
        row = read_rows(run(name=kept, rounds=2, local_rule="scaffold", momentum_at_sync=kept).folder)[-1]
        assert (row["bytes_up"], row["bytes_down"]) == (2 * 4 * 2 * UPDATE,) * 2


def test_inferred_it_sends_no_more_than_a_plain_run_and_trains_the_same_model(run: Execute) -> None:
    keys = {"momentum": 0.0, "weight_decay": 0.0, "rounds": 4}
    plain, sent, inferred = (
        run(name=rule, local_rule=rule, precision="fp64", **keys) for rule in ("none", "scaffold", "scaffold-inferred")
    )
    bytes_of = [[(row["bytes_up"], row["bytes_down"]) for row in rows_of(one)] for one in (plain, inferred)]
    assert bytes_of[0] == bytes_of[1]
    for name, value in final_model(sent).items():
        torch.testing.assert_close(final_model(inferred)[name], value, rtol=0, atol=1e-13)
    assert not torch.allclose(final_model(plain)["fc3.weight"], final_model(sent)["fc3.weight"], rtol=0, atol=1e-6)


def test_inferred_a_round_without_one_client_is_repeated_and_a_lost_memory_takes_all_back(
    small: Config, run: Execute
) -> None:
    keys = {"local-rule": "scaffold-inferred", **PLAIN_SGD, "checkpoint-every": 2}
    whole = run(name="whole", **{name.replace("-", "_"): value for name, value in keys.items()})
    for name, fault in {"absent": fail, "forgets": forget}.items():
        again = run_with(once(6, 0, fault), small.changed({**keys, "name": name}))
        assert_same_bits(final_model(again), final_model(whole))
        assert rows_of(again) == rows_of(whole)


def test_a_client_that_lost_its_control_variate_begins_anew_or_all_go_back(small: Config, run: Execute) -> None:
    """If all clients take part in each round, it is computed again; with a sample, c would keep the lost part."""
    keys = {"local-rule": "scaffold", "momentum-at-sync": "reset", "checkpoint-every": 2}
    every = run_with(once(6, 2, forget), small.changed({**keys, "name": "all"}))
    assert [row["left_out"] for row in rows_of(every)] == [{}] * 5 + [{"2": MEMORY_LOST}] + [{}] * 2

    sampled = {**keys, "fraction": 0.5}
    whole = run(name="whole", **{name.replace("-", "_"): value for name, value in sampled.items()})
    back = run_with(once(6, 0, forget), small.changed({**sampled, "name": "back"}))
    assert_same_bits(final_model(back), final_model(whole))
    assert rows_of(back) == rows_of(whole)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"local-rule.mu": 0.1}, "local-rule.mu = 0.1: none has no argument mu"),
        ({"local_rule": "scaffold:mu=0.1"}, "scaffold has no argument mu: it takes none"),
        (
            {"local_rule": "scaffold", "mean": "median"},
            "mean = median: local-rule = scaffold needs the exact mean of what",
        ),
        (
            {"local_rule": "scaffold", "outer": "flwr.serverapp.strategy:FedMedian"},
            "outer = flwr.serverapp.strategy:FedMedian: local-rule = scaffold needs the exact mean of",
        ),
        (
            {"local_rule": "scaffold", "mean.weights": "shard-size", "fraction": 0.5},
            "mean = exact:weights=shard-size: local-rule = scaffold needs clients that count the same ",
        ),
        (
            {"local_rule": "scaffold", "local_epochs": 1, "local_steps": 10, "fraction": 0.5},
            "local-epochs = 1: local-rule = scaffold needs clients that count the same .*: give --local-epochs 0",
        ),
        ({"local_rule": "scaffold-inferred"}, "momentum = 0.9: local-rule = scaffold-inferred needs SGD without "),
        (
            {"local_rule": "scaffold-inferred", "momentum": 0.0, "weight_decay": 0.0, "min_clients": 1},
            "min-clients = 1: local-rule = scaffold-inferred needs the updates of all clients: give --min-clients 0",
        ),
        (
            {"local_rule": "fednova"},
            "momentum-at-sync = keep: local-rule = fednova needs SGD .* give --momentum-at-sync r",
        ),
        (
            {"local_rule": "feddyn", "outer": "diloco"},
            "outer = diloco: local-rule = feddyn needs the mean of all models",
        ),
        ({"local_rule": "fedprox:mu=x"}, "local-rule = fedprox:mu=x: fedprox: mu = x must be a number"),
        (
            {"local_rule": "feddyn:alpha=0"},
            "feddyn:alpha=0: feddyn: alpha = 0 must be a number greater than 0",
        ),
        ({"local_rule": "fedprox+scaffold"}, r"local-rule = fedprox\+scaffold is unknown: it must be one of none, "),
        (
            {"compress": "int8+topk"},
            r"compress = int8\+topk: a chain is topk, chunked-topk or randomk, then a codec of each value",
        ),
        (
            {"test_model": "ema:decay=1"},
            "ema: decay = 1 must be a number at least 0 and less than 1",
        ),
        (
            {"optimizer": "lamb", "momentum": 0.5},
            "momentum is not used by optimizer = lamb: leave it out",
        ),
        ({"optimizer.trust": 0.5}, "optimizer.trust = 0.5: sgdm has no argument trust"),
        ({"optimizer": "lars", "schedule": "constant:milestones=1"}, "constant has no argument milestones: it takes n"),
        ({"optimizer": "lars", "lr_scaling": "sqrt"}, "lr-scaling = sqrt needs batch: give sqrt:batch=..., a whole"),
        ({"optimizer": "lars", "schedule": "multistep"}, "schedule = multistep needs milestones: give multistep:mile"),
        ({"optimizer": "rmsprop", "momentum": 0.5}, "leave it out, or give rmsprop:momentum=0.5"),
        ({"optimizer": "adamw", "momentum": 0.5}, "momentum is not used by optimizer = adamw: leave it out"),
        ({"optimizer": "adamw:lr=1"}, "adamw has no argument lr: it must be one of betas"),
        (
            {"optimizer": "adamw:fused=true"},
            "adamw has no argument fused: it must be one of betas",
        ),
        (
            {"optimizer": "sgd:dampening=0.5"},
            "sgd has no argument dampening: it must be one of mom",
        ),
        ({"optimizer": "adamw:betas=2/0.9"}, "optimizer = adamw:betas=2/0.9: Invalid beta parameter at index 0: 2"),
        ({"optimizer": "sgdm:nesterov=true", "momentum": 0.0}, "nesterov = true needs a momentum above 0"),
    ],
)
def test_keys_that_do_not_go_together_are_refused_before_anything_is_written(
    run: Execute, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    modes: tuple[Mode, ...] = ("localsgd", "centralized") if "optimizer" in str(keys) else ("localsgd",)
    for mode in modes:
        with pytest.raises(UserError, match=message) as caught:
            run(mode, **keys)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())
