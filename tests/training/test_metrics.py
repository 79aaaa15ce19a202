from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedsim.config import Config, Mode
from fedsim.errors import UserError
from fedsim.runs.records import read_summary, verified_rows
from fedsim.training.metrics import check_metrics, top5_accuracy
from tests.conftest import Call, Execute

OWN = "tests.training.test_metrics"


def wrong(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.argmax(1) != targets


def margin(outputs: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
    return scale * outputs.gather(1, targets[:, None])[:, 0]


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.argmax(1) == targets


def mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.mean()


def never(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs[:, 0] / 0 * 0


def test_top5_by_hand() -> None:
    outputs = torch.arange(7.0).repeat(3, 1)
    assert top5_accuracy(outputs, torch.tensor([1, 2, 6])).tolist() == [False, True, True]
    assert top5_accuracy(outputs[:, :3], torch.tensor([0, 1, 2])).tolist() == [True] * 3


@pytest.mark.parametrize("mode", ["localsgd", "centralized"])
def test_metrics_are_in_rows_and_summary(run: Execute, mode: Mode) -> None:
    keys = {"metrics": f"top5-accuracy+{OWN}:wrong+{OWN}:margin:scale=2", "evaluate_every": 2}
    folder = run(mode, **keys, epochs=2.0).folder
    rows = verified_rows(folder)
    assert rows[0]["test_wrong"] is None
    last = rows[-1]
    assert last["test_wrong"] == pytest.approx(1 - last["test_accuracy"], abs=1e-12)
    assert last["test_accuracy"] <= last["test_top5_accuracy"] <= 1
    assert (read_summary(folder) or {})["final_test_margin"] == last["test_margin"]


def test_a_tracker_draws_them(call: Call, small: Config) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    keys = {name: value for name, value in small.as_keys().items() if value != Config().as_keys()[name]}
    flags = [f"--{name}={value}" for name, value in {**keys, "metrics": "top5-accuracy", "name": "run"}.items()]
    assert call("localsgd", *flags, "--track", "tensorboard")[0] == 0
    events = accumulator.EventAccumulator(str(Path(small.results_dir) / "run" / "tensorboard"))
    events.Reload()
    assert "test_top5_accuracy" in events.Tags()["scalars"]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (f"{OWN}:accuracy", "accuracy is tested already: give the function another name"),
        (f"{OWN}:mean", "two examples: it must give a tensor of a number for each"),
        (f"{OWN}:never", "two examples: it must give a tensor of a number for each"),
        ("tests.training.test_metrics:nothing", "has no function or class nothing"),
        ("top6", "metrics = top6 is unknown: it must be one of none, top5-accuracy, per-class-accuracy, or "),
    ],
)
def test_a_metric_that_is_none_is_told_in_a_line(small: Config, metrics: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_metrics(small.changed({"metrics": metrics}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
