"""Topologies: their matrices, what they make of three workers by hand, and what runs with them must equal."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.config import Config
from strategies.layers import Layers
from strategies.mean import Exact
from strategies.method import ServerRound, Update
from strategies.mixing import Model, Models, as_state, consensus_distance, mix, models_of, send_own
from strategies.outer import outer_step
from strategies.topology import All, ExponentialGraph, Groups, Pairs, Ring, Row, Topology
from tests.conftest import SMALL_BATCHNORM, Call, Execute, assert_same_bits, final_model, rows_of
from tests.federation.equal_runs import resumed_and_pickled

NOLOCO: dict[str, Any] = json.loads(Path(__file__).with_name("noloco.json").read_text())
NONE = Layers()
NO_REPLIES: dict[str, Any] = {"outer": {}}
EVERY: list[Topology] = [All(), Groups(2, 3), Pairs(), Ring(), ExponentialGraph()]


@dataclass(frozen=True)
class Star(Topology):
    """All average with worker 0."""

    weight: float = 1.0

    def rows(self, round_: int, workers: int, seed: int) -> Sequence[Row]:
        return [{worker: 1.0, 0: self.weight} for worker in range(workers)]


@dataclass(frozen=True)
class Outside(Topology):
    """A worker that is not there."""

    def rows(self, round_: int, workers: int, seed: int) -> Sequence[Row]:
        return [{workers: 1.0}] * workers


@dataclass(frozen=True)
class Everywhere(Topology):
    """The weight 1 / K everywhere."""

    def rows(self, round_: int, workers: int, seed: int) -> Sequence[Row]:
        return [dict.fromkeys(range(workers), 1 / workers) for _ in range(workers)]


def matrix(topology: Topology, round_: int, workers: int) -> torch.Tensor:
    """W of a round."""
    rows = topology.rows(round_, workers, 7)
    entries = [[row.get(k, 0.0) / math.fsum(row.values()) for k in range(workers)] for row in rows]
    return torch.tensor(entries, dtype=torch.float64)


@pytest.mark.parametrize("topology", EVERY, ids=lambda topology: type(topology).__name__)
@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8])
def test_rows_and_columns_sum_to_one(topology: Topology, workers: int) -> None:
    for round_ in range(1, 8):
        w = matrix(topology, round_, workers)
        assert w.ge(0).all()
        for sums in (w.sum(0), w.sum(1)):
            torch.testing.assert_close(sums, torch.ones(workers, dtype=torch.float64))


def test_the_matrices_of_four_workers() -> None:
    third, half = 1 / 3, 0.5
    expected = [
        (
            Ring(),
            1,
            [[third, third, 0, third], [third, third, third, 0], [0, third, third, third], [third, 0, third, third]],
        ),
        (ExponentialGraph(), 1, [[half, half, 0, 0], [0, half, half, 0], [0, 0, half, half], [half, 0, 0, half]]),
        (ExponentialGraph(), 2, [[half, 0, half, 0], [0, half, 0, half], [half, 0, half, 0], [0, half, 0, half]]),
        (Groups(2, 2), 1, [[half, half, 0, 0], [half, half, 0, 0], [0, 0, half, half], [0, 0, half, half]]),
        (Groups(2, 2), 2, [[0.25] * 4] * 4),
        (Groups(3, 2), 1, [[third, third, third, 0]] * 3 + [[0, 0, 0, 1]]),
        (All(), 1, [[0.25] * 4] * 4),
    ]
    for topology, round_, rows in expected:
        torch.testing.assert_close(matrix(topology, round_, 4), torch.tensor(rows, dtype=torch.float64))


def test_pairs_are_drawn_in_each_round_and_by_the_seed() -> None:
    found = {tuple(map(tuple, Pairs().rows(round_, 4, 7))) for round_ in range(1, 30)}
    assert len(found) == 3  # as many as there are
    assert Pairs().rows(1, 9, 7) == Pairs().rows(1, 9, 7) != Pairs().rows(1, 9, 8)
    assert sorted(map(len, Pairs().rows(1, 5, 7))) == [1, 2, 2, 2, 2]


def test_rounds_of_the_exponential_graph_make_all_models_their_mean() -> None:
    w = torch.eye(8).double()
    for round_ in (1, 2, 3):
        w = matrix(ExponentialGraph(), round_, 8) @ w
    torch.testing.assert_close(w, torch.full((8, 8), 1 / 8).double())


def mixed(
    topology: Topology,
    y: dict[int, float],
    models: Models,
    weights: dict[int, float] | None = None,
    layers: Layers = NONE,
) -> tuple[Models, ServerRound]:
    """The models after a round in which the workers send `y`."""
    rows = topology.rows(1, len(models.of), 0)

    def round_at(x: dict[str, torch.Tensor]) -> ServerRound:
        return ServerRound(1, True, x, x)

    own = send_own(layers, round_at, models, rows, list(y))
    r = round_at(vector(0.0))
    weights = weights or dict.fromkeys(y, 1.0)
    r.updates = {k: Update(weights[k], vector(value), {}, NO_REPLIES, {}) for k, value in y.items()}
    return mix(layers, Exact(), r, own), r


def vector(value: float) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor([value], dtype=torch.float64)}


def unlike(*values: float) -> Models:
    return Models(list(range(len(values))), [Model(vector(value), {}, {}) for value in values])


def values(models: Models) -> list[float]:
    return [models.each[place].parameters["x"].item() for place in models.of]


def test_three_workers_by_hand() -> None:
    sent = {0: 3.0, 1: 6.0, 2: 12.0}
    start = unlike(1.0, 2.0, 3.0)
    alone = next(k for k, row in enumerate(Pairs().rows(1, 3, 0)) if len(row) == 1)
    others = [sent[k] for k in sent if k != alone]
    expected: dict[Topology, list[float]] = {
        Groups(2, 8): [4.5, 4.5, 12.0],
        Groups(3, 8): [7.0] * 3,
        Groups(1, 1): [7.0] * 3,
        Pairs(): [sent[k] if k == alone else sum(others) / 2 for k in sent],
        Ring(): [7.0] * 3,
        ExponentialGraph(): [4.5, 9.0, 7.5],
        Star(): [3.0, 4.5, 7.5],
        Star(weight=3.0): [3.0, 3.75, 5.25],
    }
    for topology, after in expected.items():
        models, r = mixed(topology, sent, start)
        assert values(models) == pytest.approx(after), topology
        assert r.next_x["x"].item() == pytest.approx(sum(after) / 3)
        if not isinstance(topology, Star):
            assert r.next_x["x"].item() == pytest.approx(7.0)  # the mean stays
        spread = math.sqrt(sum((each - sum(after) / 3) ** 2 for each in after) / 3)
        assert consensus_distance(models, r.next_x)["consensus-distance"] == pytest.approx(spread, abs=1e-12)


def test_a_row_is_weighted_by_examples_and_who_has_none_to_average_keeps_its_model() -> None:
    models, _ = mixed(Groups(2, 8), {0: 3.0, 1: 6.0}, unlike(1.0, 2.0, 3.0), {0: 2.0, 1: 1.0})
    assert values(models) == [4.0, 4.0, 3.0]
    models, _ = mixed(Groups(2, 8), {1: 6.0}, unlike(1.0, 2.0, 3.0))
    assert values(models) == [6.0, 6.0, 3.0]


def test_an_outer_step_goes_from_the_own_model_with_a_state_of_its_own() -> None:
    halfway = Layers({"outer": outer_step("sgd", lr=0.5, momentum=1.0)})
    models, _ = mixed(Groups(2, 8), {0: 3.0, 1: 6.0, 2: 12.0}, unlike(1.0, 2.0, 3.0), layers=halfway)
    assert values(models) == [1 + 3.5 / 2, 2 + 2.5 / 2, 3 + 9 / 2]
    models, _ = mixed(Groups(2, 8), {0: 3.0, 1: 6.0}, models, layers=halfway)
    assert values(models) == [2.75 + (3.5 + 1.75) / 2, 3.25 + (2.5 + 1.25) / 2, 7.5]  # 4.5 is the mean of both


def test_noloco_is_that_of_its_authors() -> None:
    layers = Layers({"outer": outer_step("noloco")})
    models = Models([0] * 4, [Model({"x": torch.tensor(NOLOCO["begin"])}, {}, {})])
    for round_ in NOLOCO["rounds"]:
        rows = [dict.fromkeys(next(group for group in round_["groups"] if k in group), 1.0) for k in range(4)]
        r = ServerRound(1, True, models.each[0].parameters, models.each[0].parameters)
        own = send_own(layers, lambda x: ServerRound(1, True, x, x), models, rows, range(4))
        r.updates = {k: Update(1.0, {"x": torch.tensor(y)}, {}, NO_REPLIES, {}) for k, y in enumerate(round_["y"])}
        models = mix(layers, Exact(), r, own)
        for k, x in enumerate(round_["x"]):
            torch.testing.assert_close(models.each[models.of[k]].parameters["x"], torch.tensor(x), rtol=0, atol=1e-6)


def test_models_are_read_as_they_were_written() -> None:
    state = {"momentum": {"x/exp_avg": torch.ones(2)}}
    models = Models([1, 0, 1], [Model(vector(1.0), {"a/b": torch.ones(1)}, {}), Model(vector(2.0), {}, state)])
    assert models_of({"topology": as_state(models)}, {}, {}, 3) == models
    assert models.shares == [1 / 3, 2 / 3]


KEYS: dict[str, Any] = {"model": SMALL_BATCHNORM, "epochs": 1.0}
METHODS: list[dict[str, Any]] = [
    {"momentum_at_sync": "average", "batchnorm_at_sync": "pooled"},
    {"compress": "topk", "local_rule": "fedprox", "fraction": 0.5},
    {"outer": "diloco", "compress": "topk"},
]


@pytest.mark.parametrize("keys", METHODS)
def test_one_group_of_all_is_all_bitwise(run: Execute, keys: dict[str, Any]) -> None:
    whole = run(name="all", **KEYS, **keys)
    group = run(name="group", topology="groups:size=4", **KEYS, **keys)
    assert_same_bits(final_model(group), final_model(whole))
    assert [row.pop("consensus_distance") for row in rows_of(group)] == [0.0] * len(rows_of(whole))
    for row, of_group in zip(rows_of(whole), rows_of(group), strict=True):
        assert row | {"consensus_distance": 0.0} == of_group


def test_one_weight_everywhere_is_all(run: Execute) -> None:
    keys = {**KEYS, "clients": 3, "precision": "fp64"}
    whole = run(name="all", **keys)
    everywhere = run(name="everywhere", topology=f"{__name__}:Everywhere", **keys)
    for name, value in final_model(whole).items():
        torch.testing.assert_close(final_model(everywhere)[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "keys",
    [
        {"topology": "groups:size=2,every=3", "momentum-at-sync": "average", "model": SMALL_BATCHNORM},
        {
            "topology": "pairs",
            "compress": "topk",
            "workers": "uneven:away=0.3",
            "batchnorm-at-sync": "local",
            "model": SMALL_BATCHNORM,
        },
        {"topology": "pairs", "outer": "noloco", "compress": "topk", "fraction": 0.5},
        {"topology": "ring", "outer": "yogi"},
    ],
)
def test_resumed_and_pickled_it_is_the_same_run_bitwise(small: Config, run: Execute, keys: dict[str, Any]) -> None:
    runs = resumed_and_pickled(small, run, {"rounds": 5, "checkpoint-every": 2, **keys})
    assert rows_of(runs.whole)[0]["consensus_distance"] > 0


def test_what_needs_one_model_is_refused_in_a_line(call: Call) -> None:
    keys = ("localsgd", "--dataset", "synthetic", "--model", "lenet5", "--clients", "4", "--topology")
    for text, others, expected in (
        ("ring", ("--outer", "streaming"), "outer = streaming needs one model of all clients"),
        ("ring", ("--outer", "flwr.serverapp.strategy:FedAdam"), "needs one model of all clients"),
        ("pairs", ("--local-rule", "scaffold"), "local-rule = scaffold needs one model of all clients"),
        ("pairs", ("--layer", "delay"), "layer = delay needs one model of all clients"),
        ("pairs", ("--test-model", "ema"), "test-model = ema needs one model of all clients"),
        ("ring", ("--layer", "tests.own_methods:Half"), "layer = tests.own_methods:Half needs one model"),
        ("groups", ("--compress-down", "fp16"), "compress-down = fp16 needs one model of all clients"),
        ("groups", ("--mean", "median"), "mean = median does not go with topology = groups"),
        ("groups:size=5", (), "topology = groups:size=5: a group of 5 needs as many clients, there are 4"),
        ("groups:size=0", (), "size"),
        ("star", (), "topology = star is unknown"),
        (f"{__name__}:Outside", (), "gives the row {4: 1.0} in round 1"),
    ):
        code, _, error = call(*keys, text, *others)
        assert (code, expected in error) == (2, True), error
