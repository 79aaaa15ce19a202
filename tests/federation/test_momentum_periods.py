"""Optimizer states that are averaged in some rounds only (DES-LOC)."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.federation.checks import check_strategy
from strategies.averaging import send, update
from strategies.layers import Layers
from strategies.mean import Exact
from strategies.method import ServerRound, State, Update, WorkerRound, Zeros
from strategies.momentum import Average
from tests.conftest import Execute, assert_same_bits, final_model, rows_of
from tests.federation.equal_runs import resumed_and_pickled
from tests.federation.test_failures import UPDATE


def test_each_entry_is_averaged_in_its_rounds_by_hand() -> None:
    """Worker k adds k + 1 to its entries in each round: averaged, each adds 1.5."""
    layers = Layers({"momentum": Average(momentum=2, second_moments=3)})
    entries = {f"w/{entry}": torch.zeros(1) for entry in ("exp_avg", "exp_avg_sq", "step")}
    state: State = layers.initial(Zeros({}, {}, {}, lambda: entries))
    memories: list[dict[str, Tensor]] = [{}, {}]
    begun: list[tuple[list[float], list[float]]] = []
    for round_ in range(1, 8):
        server = ServerRound(round_, True, {}, {})
        sent = send(layers, server, {}, state, range(2))
        replies = layers.replies(sent.layers[0], round_, state)
        found = []
        for worker in range(2):
            r = WorkerRound(worker, round_, 1, lambda _: [0.1], True, 0.0, {}, {}, {})
            layers.begin(r, memories[worker], sent.layers[worker])
            found.append({name: float(value) for name, value in r.optimizer.items()})
            r.optimizer = {name: value + worker + 1 for name, value in r.optimizer.items()}
            reply, memories[worker] = layers.end(r, memories[worker], sent.layers[worker])
            assert reply.keys() == replies.keys()
            of_layer = {name.removeprefix("momentum/"): value for name, value in reply.items()}
            server.updates = {**server.updates, worker: Update(1, {}, {}, {"momentum": of_layer}, {})}
        begun.append(([of["w/exp_avg"] for of in found], [of["w/exp_avg_sq"] for of in found]))
        assert [of["w/step"] for of in found] == begun[-1][0]
        server.weights = [0.5, 0.5]
        state = update(layers, Exact(), server, sent, state)
    assert begun == [
        ([0, 0], [0, 0]),
        ([1, 2], [1, 2]),
        ([3, 3], [2, 4]),
        ([4, 5], [4.5, 4.5]),
        ([6, 6], [5.5, 6.5]),
        ([7, 8], [6.5, 8.5]),
        ([9, 9], [9, 9]),
    ]


def test_before_the_first_average_it_is_keep_bitwise(run: Execute) -> None:
    keys = {"optimizer": "adamw", "lr": 0.001, "rounds": 3}
    kept = run(name="kept", momentum_at_sync="keep", **keys)
    averaged = run(name="averaged", momentum_at_sync="average:momentum=3,second-moments=4", **keys)
    assert_same_bits(final_model(averaged), final_model(kept))


def test_resumed_and_pickled_it_is_the_same_run_bitwise(small: Config, run: Execute) -> None:
    periods = "average:momentum=2,second-moments=3"
    keys = {"optimizer": "adamw", "lr": 0.001, "momentum-at-sync": periods, "rounds": 7, "checkpoint-every": 2}
    resumed_and_pickled(small, run, keys)


def test_an_optimizer_without_second_moments_is_refused(small: Config) -> None:
    keys = {"momentum-at-sync": "average:second-moments=6"}
    with pytest.raises(UserError, match="second-moments=6 needs an optimizer that has second moments: give --optimize"):
        check_strategy(small.changed(keys))
    check_strategy(small.changed({**keys, "optimizer": "lamb"}))


def test_the_bytes_of_a_round_follow_from_the_round(run: Execute) -> None:
    """Of Adam: the parameters in each, a momentum in every third, the other in every sixth; ten step counts."""
    keys = {"optimizer": "adamw", "lr": 0.001, "momentum_at_sync": "average:momentum=3,second-moments=6"}
    rows = rows_of(run(rounds=7, **keys))
    momenta = [0, 0, 1, 0, 0, 1, 0]
    up = [UPDATE + momentum * (UPDATE + 40) for momentum in momenta]
    up[5] += UPDATE
    down = [3 * UPDATE + 40, *up[:6]]
    for way, expected in (("up", up), ("down", down)):
        found = [row[f"bytes_{way}"] for row in rows]
        assert [after - before for before, after in itertools.pairwise([0, *found])] == [4 * of for of in expected]
