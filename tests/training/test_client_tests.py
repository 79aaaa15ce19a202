from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.data.client_shares import client_shares
from fedsim.data.datasets import load_dataset, task_of
from fedsim.data.local_folder import write_shards
from fedsim.data.metric import ACCURACY, Metric
from fedsim.device import resolve
from fedsim.errors import UserError
from fedsim.experiments.execute import execute
from fedsim.models import initial_model
from fedsim.runs.records import read_summary
from fedsim.training.client_tests import own_tests, spread, spreads
from fedsim.training.local_round import RoundStart, check_machine, take_local_round
from fedsim.training.metrics import check_metrics, per_class_accuracy
from fedsim.training.step import evaluate
from tests.conftest import NEEDS_FLWR_DATASETS, SMALL_BATCHNORM, TEXT, Execute, assert_same_bits, final_model, rows_of
from tests.federation.equal_runs import resumed_and_pickled

UNEVEN = {"partition": "dirichlet:alpha=0.3,small-shards=true", "clients": 3, "rounds": 5}
OWN_LOSS = {"dataset": "tests.tasks.test_own_loss:regression", "model": "tests.tasks.test_own_loss:linear"}


def weighted(config: Config, row: dict[str, Any]) -> float:
    """The mean of the tests of the global model on the clients' shares, weighted by their examples."""
    owners, clients = client_shares(config)
    sizes = np.bincount(owners, minlength=clients).tolist()
    total: float = sum(round(value * size, 9) for value, size in zip(row["test_clients"], sizes, strict=True) if size)
    return total / len(owners)


@NEEDS_FLWR_DATASETS
@pytest.mark.parametrize(
    "keys",
    [
        {"fraction": 0.7, "local-rule": "scaffold", "compress": "int8"},
        {"topology": "ring", "workers": "uneven:speed=0.5/1,away=0.2"},
        {"outer": "streaming:fragments=2", "test-model": "ema", "model": SMALL_BATCHNORM, "batchnorm-at-sync": "local"},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_shares_weighted_are_the_test_of_the_global_model(small: Config, run: Execute, keys: dict[str, Any]) -> None:
    """Exactly, also for a run that is resumed, and with messages that are pickled."""
    keys = {**UNEVEN, **keys, "evaluate-clients-every": 2}
    runs = resumed_and_pickled(small, run, keys)
    rows = rows_of(runs.whole)
    assert rows_of(runs.pickled) == rows
    assert ["test_clients" in row for row in rows] == [False, True, False, True, True]  # the last one too
    config = resolve(small.changed(keys), "localsgd")
    assert [weighted(config, row) == row["test_accuracy"] for row in rows if "test_clients" in row] == [True] * 3
    summary = read_summary(runs.whole.folder) or {}
    assert summary["final_test_clients"] == rows[-1]["test_clients"]
    assert summary["final_test_clients_worst"] == min(v for v in rows[-1]["test_clients"] if v is not None)


@pytest.mark.parametrize(("keys", "metric"), [(TEXT, "bits_per_byte"), (OWN_LOSS, "loss")])
def test_of_other_tasks_too_to_rounding(small: Config, run: Execute, keys: dict[str, Any], metric: str) -> None:
    keys = {**keys, "evaluate-clients-every": 1, "rounds": 2}
    row = rows_of(run(**keys))[-1]
    config = resolve(small.changed(keys), "localsgd")
    assert weighted(config, row) == pytest.approx(row[f"test_{metric}"], rel=1e-6)
    assert row["test_clients_worst"] == max(row["test_clients"])


def test_the_own_model_of_the_only_client_is_the_global_one(run: Execute) -> None:
    for row in rows_of(run(clients=1, evaluate_clients_every=1, rounds=3)):
        assert row["test_clients_own"] == row["test_clients"] == [row["test_accuracy"]]
        assert row["test_clients_own_gain"] == 0


def test_a_client_tests_its_own_model_on_its_own_share(small: Config, run: Execute) -> None:
    keys = {**OWN_LOSS, "clients": 2, "rounds": 1, "evaluate-clients-every": 1}
    row, config = rows_of(run(**keys))[0], resolve(small.changed(keys), "localsgd")
    test, owners = load_dataset(config).test, client_shares(config).owners.numpy()
    for worker, value in enumerate(row["test_clients_own"]):
        model = initial_model(config)
        end = take_local_round(config, RoundStart(worker, 1, copy.deepcopy(model.state_dict()), {}))
        model.load_state_dict(end.weights)
        share = test.subset(np.flatnonzero(owners == worker))
        assert evaluate(task_of(config), model, share)["loss"] == value
    assert row["test_clients_own"] != row["test_clients"]


def test_stacked_clients_have_the_same_tests(small: Config, run: Execute) -> None:
    keys = {"evaluate-clients-every": 1, "rounds": 2, "precision": "fp64"}
    one_by_one = rows_of(run(**keys))[-1]
    stacked = execute(resolve(small.changed({**keys, "name": "stacked"}), "localsgd"), "localsgd", engine="stacked")
    for name in ("test_clients", "test_clients_own"):
        assert rows_of(stacked)[-1][name] == one_by_one[name]


def test_the_rest_of_a_run_is_the_same_without_it(run: Execute) -> None:
    keys = {"fraction": 0.5, "rounds": 3, "dataset": "synthetic:images=128", "model": SMALL_BATCHNORM}
    plain, tested = run(name="plain", **keys), run(name="tested", **keys, evaluate_clients_every=1)
    assert_same_bits(final_model(tested), final_model(plain))
    rows = [{n: v for n, v in row.items() if not n.startswith("test_clients")} for row in rows_of(tested)]
    assert rows == rows_of(plain)


def test_clients_that_are_not_sampled_have_no_model_of_their_own(run: Execute) -> None:
    rows = rows_of(run(clients=4, fraction=0.5, evaluate_clients_every=1, rounds=3))
    for row in rows:
        assert [value is None for value in row["test_clients_own"]].count(True) == 2
        assert None not in row["test_clients"]


def test_a_spread_by_hand() -> None:
    values = [0.5, None, 0.1, 0.9, *[0.5] * 9]
    found = spread(ACCURACY, "a", values)
    assert found == {
        "a_mean": pytest.approx(0.5),
        "a_std": pytest.approx((0.32 / 12) ** 0.5),
        "a_worst": 0.1,
        "a_worst_tenth": pytest.approx(0.3),  # the mean of two of twelve
    }
    assert spread(Metric("loss", higher_is_better=False), "a", values)["a_worst"] == 0.9
    assert set(spread(ACCURACY, "a", [None]).values()) == {None}
    row = {"test_clients": [0.5, 0.5, None, 0.5], "test_clients_own": [0.75, None, 1.0, 0.5]}
    assert spreads(ACCURACY, row)["test_clients_own_gain"] == 0.125
    assert spreads(Metric("loss", higher_is_better=False), row)["test_clients_own_gain"] == -0.125
    assert own_tests(4, {0: 0.5, 2: float("nan"), 3: "much"}) == [0.5, None, None, None]


def test_per_class_accuracy_by_hand() -> None:
    outputs = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    found = per_class_accuracy(outputs, torch.tensor([0, 1, 1]))
    assert found.nan_to_num(9).tolist() == [[1, 9, 9], [9, 0, 9], [9, 1, 9]]


def half(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of three columns one that has no values."""
    return torch.tensor([1.0, 0.0, float("nan")]).expand(len(targets), 3)


def test_a_metric_of_several_numbers_is_a_list(run: Execute) -> None:
    whole = run(metrics="per-class-accuracy+tests.training.test_client_tests:half", rounds=2)
    row = rows_of(whole)[-1]
    assert row["test_half"] == [1, 0, None]
    assert sum(row["test_per_class_accuracy"]) / 10 == pytest.approx(row["test_accuracy"], abs=0.03)
    assert (read_summary(whole.folder) or {})["final_test_half"] == row["test_half"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"evaluate-every": 4, "evaluate-clients-every": 6}, "every = 6 is no multiple of evaluate-every = 4: give"),
        (
            {"dataset": "tests.tasks.test_own_loss:tokens", "model": "tests.tasks.test_own_loss:WithLoss"},
            "evaluate-clients-every = 2: loss of the model is not that of each example",
        ),
        ({**TEXT, "metrics": "per-class-accuracy"}, "metrics = per-class-accuracy: per_class_accuracy fails on the"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(small: Config, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_metrics(small.changed({"evaluate-clients-every": 2, **keys}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_node_with_images_of_its_own_is_refused(small: Config, tmp_path: Path) -> None:
    write_shards(resolve(small, "localsgd"), tmp_path / "shards")
    node = small.changed({"evaluate-clients-every": 2, "data-dir": str(tmp_path / "shards" / "0"), "device": "cpu"})
    with pytest.raises(UserError, match="evaluate-clients-every = 2: of a node with images of its own"):
        check_machine(node)
