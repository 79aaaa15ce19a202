"""Rounds of passes over each client's own images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.config import Config
from fedsim.data.local_folder import write_shards
from fedsim.device import resolve
from fedsim.errors import UserError
from fedsim.experiments.cost import cost
from fedsim.experiments.execute import execute
from fedsim.federation import client_app
from fedsim.training.local_round import RoundEnd, RoundStart, check_machine, held_images, round_inputs, take_local_round
from fedsim.training.run_plan import run_plan
from fedsim.training.stacked import check_stackable
from strategies.mean import mean
from tests.conftest import Execute, assert_same_bits, final_model, rows_of
from tests.federation.equal_runs import stopped_and_resumed

UNEVEN = {
    "local-steps": 10,
    "local-epochs": 2,
    "clients": 3,
    "dataset.images": 50,
    "batch-size": 4,
}  # 17, 17 and 16 images


@pytest.mark.parametrize("shuffle", ["epoch", "round"])
def test_a_round_takes_each_image_of_a_client_once_per_pass(small: Config, shuffle: str) -> None:
    config = resolve(
        small.changed({**UNEVEN, "epochs": 4.0, "shuffle-every": shuffle, "schedule": "cosine"}), "localsgd"
    )
    plan = run_plan(config)
    for worker, steps in ((0, 9), (1, 9), (2, 8)):
        held = held_images(config, worker)
        orders = []
        for round_ in (1, 2):
            inputs = round_inputs(config, RoundStart(worker, round_, {}, {}))
            orders.append(inputs.drawn[0].tolist())
            np.testing.assert_array_equal(np.sort(orders[-1]), np.sort(np.tile(held, 2)))
            assert len(inputs.dropout_keys) == len(inputs.rates) == steps
            assert inputs.rates == plan.rates(round_)[:steps]
        assert orders[0] != orders[1]
    assert plan.first_step(3) == 18
    assert plan.epoch(2) == 4


def test_clients_are_weighted_by_their_images(small: Config, run: Execute, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: dict[int, RoundEnd] = {}

    def observed(config: Config, start: RoundStart) -> RoundEnd:
        ends[start.worker] = end = take_local_round(config, start)
        return end

    monkeypatch.setattr(client_app, "take_local_round", observed)
    keys = {**UNEVEN, "precision": "fp64", "rounds": 1}
    one = run(**keys)
    assert [ends[worker].samples for worker in range(3)] == [34, 34, 32]
    expected = mean([ends[worker].weights for worker in range(3)], [0.34, 0.34, 0.32])
    torch.testing.assert_close(final_model(one), expected, rtol=0, atol=1e-15)
    (row,) = rows_of(one)
    assert (row["steps_done"], row["epoch"]) == (9, 2.0)
    assert row["train_loss"] == pytest.approx(sum(ends[k].loss * ends[k].samples for k in range(3)) / 100)


def test_one_client_is_centralized_training_epoch_by_epoch_bitwise(run: Execute) -> None:
    """Also where the last batch of an epoch is a smaller one."""
    keys = {"local_steps": 10, "dataset.images": 100, "schedule": "cosine", "epochs": 3.0, "warmup_epochs": 1.0}
    alone = run(name="alone", clients=1, local_epochs=1, **keys)
    central = run("centralized", name="central", **keys)
    assert_same_bits(final_model(alone), final_model(central))
    costs = ("epoch", "steps_done", "lr", "train_loss", "test_accuracy")
    assert [[row[name] for name in costs] for row in rows_of(alone)] == [
        [row[name] for name in costs] for row in rows_of(central)
    ]


@pytest.mark.parametrize("epochs", [1, 2])
def test_of_even_shards_that_batches_divide_it_is_that_many_local_steps_bitwise(
    small: Config, run: Execute, epochs: int
) -> None:
    keys = {"dataset.images": 64, "schedule": "cosine", "epochs": 4.0, "fraction": 0.5}
    steps = run(name="steps", local_steps=4 * epochs, **keys)
    passes = run(name="epochs", local_epochs=epochs, local_steps=10, **keys)
    assert_same_bits(final_model(passes), final_model(steps))
    assert rows_of(passes) == rows_of(steps)


def test_stopped_and_resumed_it_is_never_stopped_bitwise(run: Execute) -> None:
    keys = {**UNEVEN, "epochs": 8.0, "fraction": 0.7}
    whole, _ = stopped_and_resumed(run, keys, stop_after_epochs=3.0)
    assert [row["round"] for row in rows_of(whole)] == [1, 2, 3, 4, 5, 6]  # each of 2 of 3 clients, 2 passes
    assert rows_of(whole)[-1]["epoch"] == 8.0


def test_the_cost_counts_images_not_whole_batches(small: Config) -> None:
    estimate = cost(small.changed({**UNEVEN, "epochs": 6.0}), "localsgd")
    assert estimate == (300.0, 27, 3)


def test_clients_of_unequal_shards_are_not_stacked(small: Config) -> None:
    config = resolve(small.changed(UNEVEN), "localsgd")
    check_stackable(config.changed({"dataset.images": 48}))
    with pytest.raises(UserError, match="local-epochs = 2: clients that hold more images take"):
        execute(config, "localsgd", "stacked")


def test_a_node_with_images_of_its_own_is_refused(small: Config, tmp_path: Path) -> None:
    config = resolve(small.changed(UNEVEN), "localsgd")
    write_shards(config, tmp_path / "shards")
    with pytest.raises(UserError, match="local-epochs = 2: on a node with images of its own the length of a round"):
        check_machine(config.changed({"data-dir": str(tmp_path / "shards" / "0")}))
    check_machine(config)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"local_steps": 4}, "local-steps = 4 is not used with local-epochs = 1: leave one of them out"),
        (
            {"local_steps_schedule": "linear:max=20", "record_by": "epoch"},
            "local-steps-schedule = linear:max=20 is not used with local-epochs = 1",
        ),
    ],
)
def test_what_local_epochs_replace_is_refused(run: Execute, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(local_epochs=1, **{"local_steps": 10, **keys})
    assert not list(tmp_path.iterdir())
