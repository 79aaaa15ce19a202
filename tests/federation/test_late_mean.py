"""Means that arrive a round late: what that must equal, and what it does not go together with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.federation import client_app
from fedsim.federation.protocol import MEMORY_LOST
from fedsim.training.local_round import RoundEnd, RoundStart, take_local_round
from strategies.delay import Delay
from strategies.mean import mean
from strategies.method import WorkerRound
from tests.conftest import SMALL_BATCHNORM, Execute, assert_same_bits, final_model, rows_of
from tests.federation.equal_runs import resumed_and_pickled
from tests.federation.test_failures import forget, once, run_with
from tests.training.test_equalities import Quadratic


def test_two_workers_on_quadratics_by_hand() -> None:
    """f_k(w) = (w - b_k)^2 / 2 with b = 0 and 4, J = 1, rate 1/2: y, x of three rounds."""
    x = torch.zeros(1)
    own: list[dict[str, Tensor]] = [{}, {}]
    targets = [torch.tensor([0.0]), torch.tensor([4.0])]
    rounds: list[tuple[list[float], float]] = []
    for _ in range(3):
        for worker, b in enumerate(targets):
            r = WorkerRound(worker, 1, 1, lambda round_: [0.5], True, 0.0, {"w": x}, {"w": x}, {})
            Delay().begin(r, own[worker], {})
            r.y = {"w": Quadratic(torch.eye(1), b, r.start["w"]).descend(1, 0.5)}
            _, own[worker] = Delay().end(r, own[worker], {})
        x = mean(own, [0.5, 0.5])["w"]
        rounds.append(([float(y["w"]) for y in own], float(x)))
    assert rounds == [([0.0, 2.0], 1.0), ([1.0, 2.0], 1.5), ([1.0, 2.5], 1.75)]


@pytest.mark.parametrize("keys", [{"clients": 1}, {"clients": 1, "local_steps": 1, "batchnorm_at_sync": "local"}])
def test_of_one_client_it_is_the_plain_run_bitwise(run: Execute, keys: dict[str, Any]) -> None:
    keys = {"epochs": 1.0, "model": SMALL_BATCHNORM, "dataset.images": 128, **keys}
    plain, late = run(name="plain", **keys), run(name="late", layer="delay", **keys)
    assert_same_bits(final_model(late), final_model(plain))
    assert rows_of(late) == rows_of(plain)


def test_of_identical_clients_it_is_the_plain_run_bitwise(run: Execute, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_worker_0(config: Config, start: RoundStart) -> RoundEnd:
        return take_local_round(config, RoundStart(0, start.round, start.weights, start.state))

    monkeypatch.setattr(client_app, "take_local_round", of_worker_0)
    plain, late = run(name="plain", clients=3), run(name="late", clients=3, layer="delay")
    assert_same_bits(final_model(late), final_model(plain))


def test_a_client_begins_where_it_ended_and_moves_by_what_it_missed(
    run: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of what clients send is then x and the mean of their own ways."""
    took: dict[tuple[int, int], tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def observed(config: Config, start: RoundStart) -> RoundEnd:
        end = take_local_round(config, start)
        took[start.round, start.worker] = start.weights, end.weights
        return end

    monkeypatch.setattr(client_app, "take_local_round", observed)
    shape = {"clients": 2, "model": SMALL_BATCHNORM, "dataset.images": 64, "batch_size": 4, "local_steps": 1}
    keys = {"precision": "fp64", "lr": 0.1, "layer": "delay", **shape}
    models = [final_model(run(name=str(rounds), rounds=rounds, **keys)) for rounds in (1, 2, 3)]
    for name in models[0]:
        if "num_batches" in name or "running" in name:  # they continue from the client's own
            assert torch.equal(took[2, 0][0][name], took[1, 0][1][name])
            continue
        x, begun, ended = (
            models[1][name],
            *(torch.stack([took[3, worker][i][name] for worker in (0, 1)]) for i in (0, 1)),
        )
        assert not torch.equal(begun[0], begun[1])
        torch.testing.assert_close(models[2][name], x + (ended - begun).mean(0), rtol=0, atol=1e-14)
        torch.testing.assert_close(begun.mean(0), x, rtol=0, atol=1e-14)


@pytest.mark.parametrize("keys", [{}, {"compress": "topk", "outer": "slowmo", "momentum-at-sync": "reset"}])
def test_resumed_and_pickled_it_is_the_same_run_bitwise(small: Config, run: Execute, keys: dict[str, Any]) -> None:
    keys = {"layer": "delay", "clients": 2, "rounds": 5, "checkpoint-every": 2, **keys}
    whole = resumed_and_pickled(small, run, keys).whole
    in_time = final_model(run(name="in-time", **{**keys, "layer": "none"}))
    assert not torch.equal(in_time["fc3.weight"], final_model(whole)["fc3.weight"])


def test_a_client_that_lost_its_model_begins_from_the_one_sent_or_all_go_back(small: Config, run: Execute) -> None:
    keys = {"layer": "delay", "momentum-at-sync": "reset", "checkpoint-every": 2}
    whole = run(name="whole", **keys)
    back = run_with(once(6, 2, forget), small.changed({**keys, "name": "back", "min-clients": 4}))
    assert_same_bits(final_model(back), final_model(whole))
    assert rows_of(back) == rows_of(whole)
    lost = run_with(once(6, 2, forget), small.changed({**keys, "name": "lost"}))
    assert [row["left_out"] for row in rows_of(lost)] == [{}] * 5 + [{"2": MEMORY_LOST}] + [{}] * 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"fraction": 0.5},
            "fraction = 0.5: layer = delay needs all clients in each round: give --fraction 1.0, or --layer none",
        ),
        (
            {"local_rule": "scaffold"},
            "local-rule = scaffold does not go with layer = delay, with which every client begins",
        ),
        (
            {"momentum_at_sync": "average"},
            "momentum-at-sync = average does not go with layer = delay, with",
        ),
        ({"compress_down": "int8"}, "compress-down = int8: layer = delay needs models as they are"),
    ],
)
def test_what_clients_need_before_a_round_is_refused(
    run: Execute, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(layer="delay", **keys)
    assert not list(tmp_path.iterdir())
