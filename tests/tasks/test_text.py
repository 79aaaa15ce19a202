from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsim.config import Config
from fedsim.data.datasets import load_dataset, task_of
from fedsim.errors import RunFailed, UserError
from fedsim.experiments.cost import cost
from fedsim.experiments.study import read_study
from fedsim.experiments.tune import trials_of
from fedsim.federation.server_app import check_localsgd
from fedsim.models import build_model
from fedsim.rng import random_words, step_keys
from fedsim.runs.records import read_summary
from fedsim.tasks.text import OF_THE_PACKAGE, Text, read_documents, training_pieces
from fedsim.training.local_round import RoundStart, round_inputs
from fedsim.training.stacked import check_stackable
from fedsim.training.step import evaluate
from tests.conftest import TEXT, Call, Execute, assert_same_bits, final_model, rows_of
from tests.federation.equal_runs import resumed_and_pickled

TINY: dict[str, Any] = {**TEXT, "rounds": 5}
OWN = "tests.tasks.test_text"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of two documents, of 100 and 50 bytes."""
    for name, size in (("a", 100), ("b", 50)):
        (tmp_path / f"{name}.txt").write_bytes(bytes(range(size)))
    return tmp_path


def config_of(small: Config, text: Path, context: int = 8, **keys: Any) -> Config:
    return small.changed({**TINY, "dataset": f"text:path={text},context={context}", **keys})


class Uniform(nn.Module):
    """Knows nothing, but that some byte follows."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(tokens))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.expand(*x.shape, -1)


class Counting(Uniform):
    """Knows that each byte is one more than the one before, which has half of the probability."""

    def forward(self, x: Tensor) -> Tensor:
        right = nn.functional.one_hot((x + 1) % 256, 256)
        return super().forward(x) + math.log(255) * right


class TooShort(Uniform):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 1:]


class NoNumber(Uniform):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if self.training else math.nan)


def test_the_text_of_the_package_is_python_3_11_s_and_has_its_licence() -> None:
    documents = read_documents(OF_THE_PACKAGE)
    assert (len(documents), sum(map(len, documents.values()))) == (79, 466_117)
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in OF_THE_PACKAGE.read_text()


def test_pieces_share_no_byte_and_lie_within_their_document_and_split(small: Config, text: Path) -> None:
    data = load_dataset(config_of(small, text))
    train, test = data.train, data.test
    assert (len(train), len(test), data.classes) == (5 + 2, 1, 2)
    assert train.groups.tolist() == [0] * 5 + [1] * 2
    read: set[int] = set()
    for index in range(len(train)):  # the first and the last window of each piece
        ends = [
            train.batch(train.sample(np.array([index]), np.array([word], np.uint64)), ()) for word in (0, 2**64 - 1)
        ]
        first, last = int(ends[0][0][0, 0]), int(ends[1][1][0, -1])  # type: ignore[index]
        piece = set(range(first, last + 1)) if index < 5 else {200 + byte for byte in range(first, last + 1)}
        assert not piece & read
        read |= piece
    assert read == {*range(90), *range(200, 245)}  # nine tenths of each document
    inputs, targets = test.plain(0, 10)
    assert inputs.tolist() == [list(range(90, 98))]  # type: ignore[union-attr]
    assert targets.tolist() == [list(range(91, 99))]
    assert training_pieces(0, 8, 8, 0) == []


def test_windows_of_replicas_stand_side_by_side(small: Config, text: Path) -> None:
    train = load_dataset(config_of(small, text)).train
    drawn = torch.tensor([[0, 3, 7, 20]])
    alone, targets = train.batch(drawn, ())
    together, same = train.batch(drawn, (), replicas=2)
    assert isinstance(alone, Tensor)
    assert isinstance(together, Tensor)
    assert torch.equal(together, torch.cat([alone[:2], alone[2:]], dim=1))
    assert torch.equal(targets, same)


def test_windows_are_a_function_of_seed_worker_and_local_step(small: Config, text: Path) -> None:
    config = config_of(small, text, clients=1)
    one = [round_inputs(config.changed({"local-steps": 1}), RoundStart(0, r, {}, {})).drawn for r in (1, 2)]
    both = round_inputs(config.changed({"local-steps": 2}), RoundStart(0, 1, {}, {})).drawn
    assert torch.equal(torch.cat(one, dim=1), both)
    train, words = load_dataset(config).train, random_words(step_keys(0, 0, 0, 1, "augment"), 200)[0]
    starts = train.sample(np.zeros(200, np.int64), words)
    assert set(starts[0].tolist()) == set(range(8))  # of the first piece, all


def test_bits_per_byte_by_hand(small: Config, text: Path) -> None:
    test = load_dataset(config_of(small, text)).test
    assert evaluate(Text(), Uniform(256), test) == pytest.approx({"loss": math.log(256), "bits_per_byte": 8.0})
    assert evaluate(Text(), Counting(256), test)["bits_per_byte"] == pytest.approx(1.0)


def test_with_a_zero_head_it_begins_at_ln_256(small: Config) -> None:
    config = small.changed(TINY)
    task, data = task_of(config), load_dataset(config)
    model = build_model("gpt-tiny", task.outputs(config), 0, shape=task.shape(config))
    nn.init.zeros_(model.head.weight)  # type: ignore[arg-type, union-attr]
    assert evaluate(task, model, data.test)["loss"] == pytest.approx(math.log(256), rel=1e-6)


def test_a_byte_depends_on_those_before_it_alone() -> None:
    model = build_model("gpt-tiny", 256, 0, shape=(8,)).eval()
    x = torch.arange(16).view(2, 8)
    other = x.clone()
    other[:, 5] = 200
    changed = (model(x) - model(other)).abs().amax((0, 2)) > 0
    assert changed.tolist() == [False] * 5 + [True] * 3


def test_a_run_is_the_same_whole_resumed_and_with_pickled_messages(small: Config, run: Execute) -> None:
    """Its rows name what it is compared by, and its summary has the lowest value as the best."""
    runs = resumed_and_pickled(
        small, run, {**TINY, "partition": "natural-id", "clients": 79, "rounds": 4, "fraction": 0.05}
    )
    rows = rows_of(runs.whole)
    assert rows[0]["metric"] == vars(Text.metric)
    values = [row["test_bits_per_byte"] for row in rows]
    summary = read_summary(runs.whole.folder) or {}
    assert summary["best_test_bits_per_byte"] == min(values) < values[0] < 8.1
    assert summary["final_test_bits_per_byte"] == values[-1]
    assert "test_accuracy" not in rows[0]
    assert "best_test_accuracy" not in summary


def test_one_client_is_centralized_training_bitwise(small: Config, run: Execute, text: Path) -> None:
    keys = {**config_of(small, text).as_keys(), "clients": 1, "rounds": 0, "epochs": 2.0, "batch-size": 7}
    whole = run("centralized", **{**keys, "name": "centralized"})
    local = run(**{**keys, "name": "local", "local-steps": 2})
    assert_same_bits(final_model(whole), final_model(local))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"dataset": "text:context=0"},
            "dataset = text:context=0: text: context = 0 must be a whole number at least 1",
        ),
        ({"dataset": "text:context=90000"}, "no document has 90001 bytes for training, which a window of context = 90"),
        ({"dataset": "text:context=6400"}, "no document has 6401 bytes for tests"),
        ({"dataset": "text:path=no.txt"}, "dataset = text:path=no.txt: there is no such file in"),
        ({"dataset": "text:path=/no.txt"}, "dataset = text:path=/no.txt: there is no such file in /"),
        ({"model": "lenet5"}, "model = lenet5 cannot be built for 256 outputs and inputs of 8 (ValueError: not eno"),
        ({"model": "lenet5"}, "): give a model of such inputs, or other arguments"),
        ({"model": "gpt-tiny:width=9"}, "model = gpt-tiny:width=9 cannot be built for 256 outputs and inputs of 8 (Va"),
        (
            {"model": f"{OWN}:TooShort"},
            "the windows of text:context=8: it gives 2 x 7 x 256, not 2 x 8 x 256 logits for",
        ),
        ({"augment": "crop"}, "augment = crop is of images, and dataset = text:context=8 has none: leave it out"),
        ({"validation": 10**6}, "leaves none of the 26181 training windows"),
        ({"partition": "pachinko"}, "needs superclasses, which cifar100 alone has"),
        ({"clients": 10**5}, "clients = 100000 is more than the"),
    ],
)
def test_what_does_not_fit_is_told_in_a_line(small: Config, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_localsgd(small.changed({**TINY, **keys}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_texts_are_not_stacked(small: Config) -> None:
    with pytest.raises(UserError, match="dataset = text:context=8: models of windows cannot be stacked: give --engine"):
        check_stackable(small.changed(TINY))


def test_an_empty_text_and_a_folder_without_any_are_told(small: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no file NAME\.txt: give a folder that does"):
        load_dataset(config_of(small, tmp_path))
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="is empty: give a text"):
        load_dataset(config_of(small, tmp_path))


def test_a_text_that_has_changed_is_told(small: Config, text: Path) -> None:
    load_dataset(config_of(small, text))
    (text / "b.txt").write_bytes(bytes(60))
    with pytest.raises(UserError, match="has changed since this process read it: start anew"):
        load_dataset(config_of(small, text))


def test_a_metric_that_is_no_number_ends_a_run_in_a_line(run: Execute) -> None:
    with pytest.raises(RunFailed, match="the loss of the model in a test is nan: a lower --lr may help"):
        run(**{**TINY, "model": f"{OWN}:NoNumber"})


def test_a_relative_path_is_looked_for_in_the_data_dir(small: Config, text: Path) -> None:
    config = small.changed({**TINY, "dataset": "text:path=a.txt,context=8", "data-dir": str(text)})
    assert load_dataset(config).classes == 1


def test_the_report_of_a_text_goes_by_its_metric(call: Call, run: Execute, tmp_path: Path) -> None:
    for lr in (0.001, 0.01):
        folder = run(**{**TINY, "lr": lr, "name": f"lr{lr}"}).folder
    code, out, err = call("report", str(folder.parent), "-o", str(tmp_path / "report"))
    assert code == 0, err
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Bits per byte on test windows" in text
    assert "in final bits per byte, ± half" in text
    assert (tmp_path / "report" / f"{folder.parent.name}-bits_per_byte.svg").exists()
    runs = next((tmp_path / "report").glob("*-runs.csv")).read_text()
    assert "best_test_bits_per_byte" in runs.splitlines()[0]
    code, out, err = call(
        "time-to-accuracy", str(folder.parent), "--target", "7.9", "--bandwidth", "1Mbit", "--latency", "1ms"
    )
    assert code == 0, err
    assert "7.9 bits per byte on test windows" in out


def test_the_study_of_texts_has_equal_tokens_and_a_trial_for_each_rate() -> None:
    plain, outer = map(read_study, ("diloco-text", "diloco-text-outer"))
    cells = [*plain.cells(), *outer.cells()]
    tokens = [cost(cell.config, cell.mode).images for cell in cells]
    assert max(tokens) - min(tokens) <= 64  # of windows: less than a step of all workers
    assert [len(trials_of(study, study.cells())) for study in (plain, outer)] == [5 * 3, 4 * 3 * 3]
