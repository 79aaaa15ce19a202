"""The local rules on quadratic losses, in float64, averaged by the real strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedsim.config import Config
from fedsim.federation.in_process import InProcessGrid
from fedsim.training.gradient_terms import gradient_terms
from fedsim.training.methods import layers_of
from strategies.local_sgd import LocalSGD
from strategies.method import WorkerRound, Zeros
from strategies.scaffold import CORRECTION, SENT, ScaffoldInferred
from strategies.screening import DECLINED
from strategies.sections import Sections, join, split
from strategies.tensor_array import tensor_record, tensors_of
from tests.federation.test_failures import round_of

WORKERS, SIZE, STEPS, LR = 3, 4, 5, 0.1
Fails = Callable[[int, int], bool]  # of a round and a worker
OPTIMUM_WITHIN = 1e-12


def quadratics() -> list[tuple[Tensor, Tensor]]:
    """(A, b) of f(x) = x' A x / 2 - b' x, whose gradient is A x - b: three with nothing in common."""
    rng = np.random.default_rng(0)
    roots = [rng.normal(size=(SIZE, SIZE)) for _ in range(WORKERS)]
    return [(torch.from_numpy(r @ r.T / 4 + np.eye(SIZE)), torch.from_numpy(rng.normal(size=SIZE))) for r in roots]


def trained(
    rounds: int,
    keys: dict[str, Any],
    fails: Fails = lambda round_, worker: False,
    steps: Callable[[int], int] = lambda worker: STEPS,
    lr: float = LR,
) -> tuple[Tensor, float]:
    """The distance from the optimum after each round, and the largest one of c from the mean of all c_k."""
    config = Config(clients=WORKERS, device="cpu", threads=1).changed(keys)
    layers, losses = layers_of(config), quadratics()
    kept: list[dict[str, Tensor]] = [{} for _ in losses]
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        worker, round_ = int(context.node_config["partition-id"]), round_of(message)
        x, _, received = split(tensors_of(message.content.array_records["arrays"]))
        j = steps(worker)
        r = WorkerRound(worker, round_, j, lambda _: [lr] * j, config.fraction == 1, 0.0, x, x, {})
        layers.begin(r, kept[worker], received)
        y = nn.Parameter(r.start["x"].clone())
        optimizer, terms = torch.optim.SGD([y], lr=lr), gradient_terms({"x": y}, layers.terms)
        if terms:
            terms.begin(r.constant)
        for _ in range(j):
            y.grad = (losses[worker][0] @ y - losses[worker][1]).detach()
            if terms:
                terms.add()
            optimizer.step()
        r.y, r.mean_gradient = {"x": y.detach()}, terms.end(j) if terms else {}
        if fails(round_, worker):
            return Message(RecordDict({DECLINED: ConfigRecord({"reason": "of the test"})}), reply_to=message)
        replies, kept[worker] = layers.end(r, kept[worker], received)
        metrics = MetricRecord({"num-examples": STEPS})
        arrays = tensor_record(join(Sections(r.y, {}, replies)))
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    strategy = LocalSGD(population=WORKERS, fraction_train=config.fraction, layers=layers)
    zero = {"x": torch.zeros(SIZE, dtype=torch.float64)}
    arrays, state = tensor_record(zero), layers.initial(Zeros(zero, {}, {}))
    optimum = torch.linalg.solve(sum(a for a, _ in losses), sum(b for _, b in losses))
    distances, off = [], 0.0
    with InProcessGrid(app, config) as grid:
        for round_ in range(1, rounds + 1):
            nodes = {node: worker for worker, node in enumerate(grid.get_node_ids())}
            request = strategy.request(round_, arrays, ConfigRecord(), nodes, state)
            result = strategy.aggregate(round_, request, grid.send_and_receive(request.messages), state)
            arrays, state = result.arrays or arrays, result.state
            distances.append((tensors_of(arrays)["x"] - optimum).abs().max())
            c = state.get("local-rule", {}).get("x")
            if c is not None:
                mean = torch.stack([own.get("local-rule/x", torch.zeros_like(c)) for own in kept]).mean(0)
                off = max(off, float((c - mean).abs().max()))
    return torch.stack(distances), off


def test_scaffold_finds_the_optimum_beside_which_local_steps_settle() -> None:
    plain, _ = trained(80, {})
    assert plain[-1] > 1e-2
    distances, off = trained(80, {"local-rule": "scaffold"})
    assert distances[-1] < OPTIMUM_WITHIN
    assert off < 1e-14  # c is the mean of all c_k after each round
    inferred, _ = trained(80, {"local-rule": "scaffold-inferred", "momentum": 0.0, "weight-decay": 0.0})
    torch.testing.assert_close(inferred, distances, rtol=0, atol=1e-14)
    proximal, _ = trained(80, {"local-rule": "fedprox:mu=5"})
    assert OPTIMUM_WITHIN < proximal[-1] < plain[-1]  # FedProx comes nearer


def test_scaffold_finds_it_with_a_sample_of_the_clients_and_without_those_left_out() -> None:
    """A client that is left out keeps the c_k that its last update averaged came with."""
    random = np.random.default_rng(1)
    absent = random.random((100, WORKERS)) < 0.2
    rule = {"local-rule": "scaffold"}
    sampled, off = trained(100, {"fraction": 2 / 3, **rule}, lambda round_, worker: bool(absent[round_ - 1, worker]))
    assert sampled[-1] < OPTIMUM_WITHIN
    assert off < 1e-14
    every, _ = trained(100, rule, lambda round_, worker: round_ < 30 and bool(absent[round_ - 1, worker]))
    assert every[25] > 1e-4
    assert every[-1] < OPTIMUM_WITHIN


@pytest.mark.parametrize(("rates", "correction"), [([0.5, 0.5], 0.0), ([0.0, 0.0], 2.0)])
def test_an_inferred_correction_by_hand(rates: list[float], correction: float) -> None:
    """Of 2, with 1 sent and 3 got after rates that sum to one: 2 + (1 - 3) / 1; where no model moved it stays."""
    r = WorkerRound(0, 2, 2, lambda _: rates, True, 0.0, x := {"w": torch.tensor(3.0)}, x, {})
    ScaffoldInferred().begin(r, {CORRECTION + "w": torch.tensor(2.0), SENT + "w": torch.tensor(1.0)}, {})
    assert r.constant == {"w": correction}


def test_feddyn_finds_the_optimum_also_with_a_sample_of_the_clients() -> None:
    every, _ = trained(150, {"local-rule": "feddyn:alpha=1"})
    assert every[-1] < OPTIMUM_WITHIN
    sampled, off = trained(
        200, {"local-rule": "feddyn:alpha=1", "fraction": 2 / 3}, lambda round_, worker: (round_, worker) == (3, 1)
    )
    assert sampled[-1] < OPTIMUM_WITHIN
    assert off < 1e-14  # h is the mean of all h_k after each round, also of those that were not sampled or left out


def test_fednova_comes_nearer_where_workers_take_unequal_steps() -> None:
    """Of workers that take 1, 4 and 12 small steps, the average is that of other losses."""
    unequal: dict[str, Any] = {"steps": lambda worker: (1, 4, 12)[worker], "lr": 0.005}
    plain, nova = (trained(100, {"local-rule": rule}, **unequal)[0][-1] for rule in ("none", "fednova"))
    assert nova < plain / 5
    even = [trained(20, {"local-rule": rule})[0] for rule in ("none", "fednova")]
    torch.testing.assert_close(*even, rtol=0, atol=1e-13)
