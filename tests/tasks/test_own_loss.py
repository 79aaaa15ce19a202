from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.config import Config
from fedsim.data.datasets import load_dataset
from fedsim.errors import RunFailed, UserError
from fedsim.federation.server_app import check_localsgd
from fedsim.models import initial_model
from fedsim.runs.records import read_summary
from tests.conftest import Execute, final_model, rows_of
from tests.federation.equal_runs import resumed_and_pickled

OWN = "tests.tasks.test_own_loss"
PLAIN: dict[str, Any] = {"momentum": 0.0, "weight-decay": 0.0, "lr": 0.05}


def arrays(count: int = 96, targets: int = 1) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    given: dict[str, Any] = {}
    for split, size in (("train", count), ("test", count // 4)):
        inputs = rng.standard_normal((size, 5))
        given |= {f"{split}_inputs": inputs, f"{split}_targets": inputs @ rng.standard_normal((5, targets))}
    return given


def regression() -> dict[str, Any]:
    return {**arrays(), "loss": F.mse_loss}


def labels() -> dict[str, Any]:
    """Several labels for each example, in three groups."""
    given = arrays(targets=4)
    for split in ("train", "test"):
        given[f"{split}_targets"] = (given[f"{split}_targets"] > 0).astype(np.float32)
        given[f"{split}_groups"] = np.arange(len(given[f"{split}_inputs"])) % 3
    return {**given, "loss": "torch.nn.functional:binary_cross_entropy_with_logits"}


def tokens() -> dict[str, Any]:
    """Without a loss: the model has it."""
    names = ("train_ids", "train_labels", "test_ids", "test_labels")
    return {name: torch.arange(60).view(20, 3) for name in names}


def linear(outputs: int, shape: tuple[int]) -> nn.Module:
    return nn.Linear(shape[0], outputs, bias=False)


def flat(outputs: int, shape: tuple[int]) -> nn.Module:
    return nn.Sequential(nn.Linear(shape[0], outputs), nn.Flatten(0))


class WithLoss(nn.Module):
    """As the models of Hugging Face: an object with the loss and more."""

    def __init__(self, outputs: int, shape: tuple[int]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 1)

    def forward(self, ids: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.embedding(ids)
        return SimpleNamespace(loss=(logits - labels[..., None] / 60).square().mean(), logits=logits)


class Diverging(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight * (1 if self.training else float("nan"))


def test_one_local_step_of_a_regression_is_gradient_descent_in_closed_form(small: Config, run: Execute) -> None:
    """With whole shards in a batch: w_t - w* = (I - lr H)^t (w_0 - w*), with H and w* of all examples."""
    keys = {**PLAIN, "dataset": f"{OWN}:regression", "model": f"{OWN}:linear", "precision": "fp64"}
    keys |= {"batch-size": 24, "local-steps": 1, "rounds": 7}
    start = initial_model(small.changed(keys)).get_parameter("weight").detach()
    trained = final_model(run(**keys))["weight"]
    given = arrays()
    x, y = torch.from_numpy(given["train_inputs"]), torch.from_numpy(given["train_targets"])
    best = torch.linalg.lstsq(x, y).solution.mT
    step = torch.eye(5, dtype=torch.float64) - keys["lr"] * 2 / 96 * x.mT @ x
    expected = best + (start - best) @ torch.linalg.matrix_power(step, 7)
    torch.testing.assert_close(trained, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("dataset", "model"), [("labels", "linear"), ("tokens", "WithLoss")])
def test_a_run_is_the_same_whole_resumed_and_with_pickled_messages(
    small: Config, run: Execute, dataset: str, model: str
) -> None:
    keys = {**PLAIN, "dataset": f"{OWN}:{dataset}", "model": f"{OWN}:{model}", "rounds": 5}
    runs = resumed_and_pickled(small, run, keys)
    losses = [row["test_loss"] for row in rows_of(runs.whole)]
    assert losses[-1] < losses[0]
    summary = read_summary(runs.whole.folder) or {}
    assert (summary["best_test_loss"], summary["final_test_loss"]) == (min(losses), losses[-1])


def test_groups_are_given_or_targets_that_are_integers(small: Config) -> None:
    data = load_dataset(small.changed({"dataset": f"{OWN}:labels", "model": f"{OWN}:linear"}))
    assert (data.classes, data.train.groups.tolist()[:4]) == (3, [0, 1, 2, 0])
    assert load_dataset(small.changed({"dataset": f"{OWN}:regression"})).train.groups.tolist() == [0] * 96


def test_a_validation_split_holds_out_rows(small: Config) -> None:
    data = load_dataset(small.changed({"dataset": f"{OWN}:regression", "validation": 10}))
    assert (len(data.train), len(data.test)) == (86, 10)


def given(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in {**regression(), **changes}.items() if value is not None}


def lacking() -> dict[str, Any]:
    return given(test_inputs=None)


def of_one_split() -> dict[str, Any]:
    return given(inputs=np.zeros(3))


def unequal() -> dict[str, Any]:
    return given(train_targets=np.zeros((3, 1)))


def unlike() -> dict[str, Any]:
    return given(test_inputs=np.zeros((24, 4)))


def empty() -> dict[str, Any]:
    return given(train_inputs=np.zeros((0, 5)))


def with_nan() -> dict[str, Any]:
    return given(train_targets=np.full((96, 1), np.nan))


def no_function() -> dict[str, Any]:
    return given(loss=3)


def no_such_function() -> dict[str, Any]:
    return given(loss="torch.nn.functional:no_loss")


def no_targets() -> dict[str, Any]:
    return given(train_targets=None, test_targets=None)


def sum_of_none() -> dict[str, Any]:
    return given(loss=lambda outputs, targets: (outputs - targets).square())


def ragged() -> dict[str, Any]:
    return given(train_inputs=[[1.0], [1.0, 2.0]])


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("lacking", "inputs is of one split: give train_inputs and test_inputs"),
        ("of_one_split", "inputs is neither train_NAME nor test_NAME nor loss"),
        ("unequal", "the numbers of examples differ: train_inputs 96, train_targets 3"),
        ("unlike", "test_inputs is float64 [24, 4], and train_inputs float64 [96, 5]: make them alike"),
        ("empty", "train_inputs is empty: float64 [0, 5]"),
        ("with_nan", "train_targets holds nan or inf"),
        ("no_function", "loss is int: it must be a function or the name of one"),
        (
            "no_such_function",
            "loss = torch.nn.functional:no_loss: torch.nn.functional has no function or class no_loss",
        ),
        ("no_targets", "has a loss and no train_targets: give them, or leave it to the model"),
        ("sum_of_none", "the loss is a tensor [2, 1], not a number: let it be the mean over a batch"),
        ("ragged", "train_inputs is no tensor (ValueError"),
    ],
)
def test_data_that_cannot_be_learned_is_told_in_a_line(small: Config, dataset: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_localsgd(small.changed({"dataset": f"{OWN}:{dataset}", "model": f"{OWN}:linear"}))
    assert f"dataset = {OWN}:{dataset}" in str(caught.value) or f"of {OWN}:{dataset}" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": f"{OWN}:flat"}, "the loss fails (UserWarning: Using a target size"),
        ({"model": "lenet5"}, "model = lenet5 cannot be built for 1 outputs and inputs of 5 (ValueError"),
        ({"dataset": f"{OWN}:tokens"}, f"does not take the ids, labels of {OWN}:tokens (TypeError"),
        ({"dataset": f"{OWN}:tokens", "model": f"{OWN}:NoLoss"}, "it gives Tensor, which has no loss: let it, or"),
    ],
)
def test_a_model_that_does_not_fit_is_told_in_a_line(small: Config, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_localsgd(small.changed({"dataset": f"{OWN}:regression", "model": f"{OWN}:linear", **keys}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


class NoLoss(WithLoss):
    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(ids, labels).loss  # type: ignore[no-any-return]


def test_a_loss_that_is_no_number_in_a_test_ends_a_run_in_a_line(run: Execute) -> None:
    with pytest.raises(RunFailed, match="the loss of the model in a test is nan"):
        run(dataset=f"{OWN}:regression", model=f"{OWN}:Diverging", rounds=1)
