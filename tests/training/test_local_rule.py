"""The local rules on quadratic losses, in float64, averaged by the real strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedsim.config import Config
from fedsim.federation.in_process import InProcessGrid
from fedsim.training.local_rule import build_rule, control_message, control_variate, correction_of, inferred_correction
from strategies import DECLINED, LocalSGD, join, split, tensor_record, tensors_of
from strategies.sections import Sections

WORKERS, SIZE, STEPS, LR = 3, 4, 5, 0.1
Fails = Callable[[int, int], bool]  # of a round and a worker
OPTIMUM_WITHIN = 1e-12


def quadratics() -> list[tuple[Tensor, Tensor]]:
    """(A, b) of f(x) = x' A x / 2 - b' x, whose gradient is A x - b: three with nothing in common."""
    rng = np.random.default_rng(0)
    roots = [rng.normal(size=(SIZE, SIZE)) for _ in range(WORKERS)]
    return [(torch.from_numpy(r @ r.T / 4 + np.eye(SIZE)), torch.from_numpy(rng.normal(size=SIZE))) for r in roots]


def trained(rounds: int, keys: dict[str, Any], fails: Fails = lambda round_, worker: False) -> tuple[Tensor, float]:
    """The distance from the optimum after each round, and the largest one of c from the mean of all c_k."""
    config = Config(clients=WORKERS, device="cpu", threads=1).changed(keys)
    losses = quadratics()
    kept: list[dict[str, Tensor]] = [{} for _ in losses]
    inferred: list[tuple[dict[str, Tensor], dict[str, Tensor]] | None] = [None for _ in losses]
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        worker = int(context.node_config["partition-id"])
        x, _, c = split(tensors_of(message.content.array_records["arrays"]))
        y = nn.Parameter(x["x"].clone())
        optimizer, rule = torch.optim.SGD([y], lr=LR), build_rule(config, {"x": y})
        c_k = control_variate(config, c, kept[worker])
        correction = correction_of(c, c_k)
        if config.local_rule == "scaffold-inferred":
            correction, last_y = inferred[worker] or ({"x": torch.zeros_like(y)}, {"x": y.detach()})
            correction = inferred_correction(correction, last_y, x, STEPS * LR)
        gradients: dict[str, Tensor] = {}
        if rule:
            rule.begin(correction)
        for _ in range(STEPS):
            y.grad = (losses[worker][0] @ y - losses[worker][1]).detach()
            if rule:
                rule.correct_gradients()
            optimizer.step()
        if rule:
            gradients = rule.end(STEPS)
        if fails(int(message.content.config_records["config"]["server-round"]), worker):  # type: ignore[arg-type]
            return Message(RecordDict({DECLINED: ConfigRecord({"reason": "of the test"})}), reply_to=message)
        sent = Sections({"x": y.detach()}, {}, control_message(config, c, c_k, gradients))
        kept[worker], inferred[worker] = gradients, (correction, {"x": y.detach().clone()})
        metrics = MetricRecord({"num-examples": STEPS})
        return Message(RecordDict({"arrays": tensor_record(join(sent)), "metrics": metrics}), reply_to=message)

    strategy = LocalSGD(population=WORKERS, fraction_train=config.fraction, population_extras="")
    zero = {"x": torch.zeros(SIZE, dtype=torch.float64)}
    arrays = tensor_record(join(Sections(zero, {}, zero if config.local_rule == "scaffold" else {})))
    optimum = torch.linalg.solve(sum(a for a, _ in losses), sum(b for _, b in losses))
    distances, off = [], 0.0
    with InProcessGrid(app, config) as grid:
        for round_ in range(1, rounds + 1):
            nodes = {node: worker for worker, node in enumerate(grid.get_node_ids())}
            request = strategy.request(round_, arrays, ConfigRecord(), nodes)
            result = strategy.aggregate(round_, request, grid.send_and_receive(request.messages), {})
            arrays = result.arrays or arrays
            x, _, c = split(tensors_of(arrays))
            distances.append((x["x"] - optimum).abs().max())
            if c and not result.left_out:
                mean = torch.stack([of_worker.get("x", torch.zeros_like(c["x"])) for of_worker in kept]).mean(0)
                off = max(off, float((c["x"] - mean).abs().max()))
    return torch.stack(distances), off


def test_scaffold_finds_the_optimum_beside_which_local_steps_settle() -> None:
    plain, _ = trained(80, {})
    assert plain[-1] > 1e-2
    distances, off = trained(80, {"local-rule": "scaffold"})
    assert distances[-1] < OPTIMUM_WITHIN
    assert off < 1e-14  # c is the mean of all c_k after each round
    inferred, _ = trained(80, {"local-rule": "scaffold-inferred", "momentum": 0.0, "weight-decay": 0.0})
    torch.testing.assert_close(inferred, distances, rtol=0, atol=1e-14)
    proximal, _ = trained(80, {"local-rule": "fedprox", "prox-mu": 5.0})
    assert OPTIMUM_WITHIN < proximal[-1] < plain[-1]  # FedProx comes nearer


def test_scaffold_finds_it_with_a_sample_of_the_clients_and_without_those_left_out() -> None:
    """A client that is left out keeps the c_k that its last update averaged came with."""
    random = np.random.default_rng(1)
    absent = random.random((300, WORKERS)) < 0.2
    rule = {"local-rule": "scaffold"}
    sampled, off = trained(300, {"fraction": 2 / 3, **rule}, lambda round_, worker: bool(absent[round_ - 1, worker]))
    assert sampled[-1] < OPTIMUM_WITHIN
    assert off < 1e-14
    every, _ = trained(100, rule, lambda round_, worker: round_ < 30 and bool(absent[round_ - 1, worker]))
    assert every[25] > 1e-4
    assert every[-1] < OPTIMUM_WITHIN
