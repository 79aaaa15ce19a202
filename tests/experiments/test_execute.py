"""Whole runs in this process: both modes, their equalities, their records, their failures."""

from __future__ import annotations

import inspect
import json
import re
import sys
import threading
import traceback
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict
from torch import Tensor

import fedsim
from fedsim import device as pool
from fedsim.config import Config
from fedsim.data.partition import check_partition
from fedsim.device import resolve
from fedsim.errors import RunFailed, UserError
from fedsim.experiments.execute import check, execute, resolve_run
from fedsim.federation import client_app, server_app
from fedsim.federation.checks import check_strategy
from fedsim.federation.in_process import InProcessGrid
from fedsim.federation.resources import check_memory
from fedsim.models import check_model
from fedsim.models.lenet import LeNet5
from fedsim.optim import check_optimizer
from fedsim.runs.records import read_summary
from fedsim.training import step
from fedsim.training.step import take_step
from tests.commands import ROOT
from tests.conftest import SMALL_BATCHNORM, Call, Execute, assert_same_bits, final_model, register, rows_of

BN_AND_DROPOUT: dict[str, Any] = {"model": SMALL_BATCHNORM, "dataset.images": 128, "batch-size": 16, "momentum": 0.9}


@pytest.mark.parametrize("optimizer", ["sgdm", "lars", "lamb"])
def test_one_client_is_centralized_training_bitwise(run: Execute, optimizer: str) -> None:
    """Every batch, crop, mask, rate and update: with BN, dropout, warm-up, cosine and momentum over the syncs."""
    keys = {
        **BN_AND_DROPOUT,
        "optimizer": optimizer,
        "schedule": "cosine",
        "warmup-epochs": 1.0,
        "decay-biases-and-norms": False,
    }
    if optimizer == "lars":
        keys["optimizer"] = "lars:trust=0.1"
    local = run("localsgd", clients=1, local_steps=8, name="local", **keys)
    central = run("centralized", name="central", **keys)
    assert_same_bits(final_model(local), final_model(central))
    for one, other in zip(rows_of(local), rows_of(central), strict=True):
        assert {k: one[k] for k in ("train_loss", "test_loss", "lr", "epoch", "steps_done")} == {
            k: other[k] for k in ("train_loss", "test_loss", "lr", "epoch", "steps_done")
        }


@pytest.mark.parametrize("local_steps", [1, 2, 16])
def test_one_client_is_centralized_training_at_every_j(run: Execute, local_steps: int) -> None:
    """Rounds that are shorter or longer than the epoch of 8 steps: crops and masks belong to the local step."""
    local = run("localsgd", clients=1, local_steps=local_steps, name="local", **BN_AND_DROPOUT)
    assert_same_bits(final_model(local), final_model(run("centralized", name="central", **BN_AND_DROPOUT)))


def test_one_client_is_not_stacked(run: Execute, small: Config) -> None:
    local = run("localsgd", clients=1, name="local", **BN_AND_DROPOUT)
    config = small.changed({"clients": 1, "name": "stacked", **BN_AND_DROPOUT})
    stacked = execute(resolve(config, "localsgd"), "localsgd", "stacked")
    assert_same_bits(final_model(local), final_model(stacked))


@pytest.mark.parametrize(
    ("keys", "engine"),
    [
        ({}, "stacked"),
        ({"device": "cpu"}, "local"),
        ({"fraction": 0.25}, "local"),
        ({"model": "vit-tiny"}, "local"),
        ({"local-steps": 10, "local-epochs": 1, "dataset.images": 50}, "local"),
    ],
)
def test_on_a_gpu_the_clients_of_a_round_are_stacked_where_they_can_be(
    small: Config, keys: dict[str, Any], engine: str
) -> None:
    """On a CPU they are one by one; nor can one client be stacked, nor clients that take different numbers of steps."""
    config = small.changed({"device": "cuda", "threads": 0, **keys})
    resolved, chosen = resolve_run(config, "localsgd", "local", here=False)
    assert (resolved.threads, chosen) == (1, engine)


CHECKS = (check_model, check_strategy, check_partition, check_memory, check_optimizer)


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("by", ["command line", "Python"])
def test_each_check_of_a_run_is_made_once(call: Call, small: Config, by: str, resumed: bool) -> None:
    names = {inspect.unwrap(check).__code__: check.__name__ for check in CHECKS}
    made: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code in names:
            made[names[frame.f_code]] += 1

    keys = {name: value for name, value in small.as_keys().items() if value != Config().as_keys()[name]}
    if resumed:
        execute(resolve(small.changed({"stop-after-rounds": 1}), "localsgd"), "localsgd")
    sys.setprofile(count)
    try:
        if by == "Python":
            fedsim.localsgd(**{name.replace("-", "_"): value for name, value in keys.items()})
        else:
            assert call("localsgd", *(f"--{name}={value}" for name, value in keys.items()))[0] == 0
    finally:
        sys.setprofile(None)
    assert made == dict.fromkeys(names.values(), 1)


def test_from_the_command_line_to_a_step_a_run_passes_the_functions_that_the_design_lists(
    call: Call, small: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides the list: `invoke`, which imports torch, and where the thread is begun and waited for."""
    stacks: list[list[traceback.FrameSummary]] = []

    def recorded(*arguments: Any, **keywords: Any) -> Any:
        waiting, own = sys._current_frames()[threading.main_thread().ident or 0], sys._getframe(1)
        stacks.append([*traceback.extract_stack(waiting), *traceback.extract_stack(own)])
        return take_step(*arguments, **keywords)

    monkeypatch.setattr(step, "take_step", recorded)
    keys = {name: value for name, value in small.as_keys().items() if value != Config().as_keys()[name]}
    assert call("localsgd", *(f"--{name}={value}" for name, value in keys.items()), "--stop-after-rounds=1")[0] == 0
    passed = [frame for frame in stacks[0] if frame.filename.startswith(str(ROOT / "fedsim"))]
    names = [frame.name for frame in passed if frame.name not in ("invoke", "_one_by_one", "_replies", "<listcomp>")]
    listed = (ROOT / "docs" / "design.md").read_text().split("run.py localsgd\n")[1].split("```")[0]
    assert [*names, "take_step"] == [
        name for line in listed.splitlines() for name in re.findall(r"\w+", line[36:].split("  ")[0])
    ]


def test_models_are_tried_on_one_thread(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    used: set[int] = set()

    class Watched(LeNet5):
        def forward(self, x: Tensor) -> Tensor:
            used.add(torch.get_num_threads())
            return super().forward(x)

    register(monkeypatch, "lenet5", Watched)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        check(resolve(small, "localsgd"), "localsgd", "stacked")
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert (used, after) == ({1}, 3)


@pytest.mark.parametrize(
    ("momentum_at_sync", "optimizer"), [("keep", "sgdm"), ("reset", "sgdm"), ("average", "sgdm"), ("keep", "lamb")]
)
def test_stopped_and_resumed_is_never_stopped_bitwise(run: Execute, momentum_at_sync: str, optimizer: str) -> None:
    keys = {"momentum-at-sync": momentum_at_sync, "optimizer": optimizer, "schedule": "cosine", "evaluate-every": 3}
    keys["rounds"] = 6
    whole = run(name="whole", **keys)
    for stop in (1, 4):
        part = run(name="parts", stop_after_rounds=stop, **keys)
        assert (len(rows_of(part)), part.finished) == (stop, False)
    part = run(name="parts", **keys)
    assert part.finished
    assert_same_bits(final_model(part), final_model(whole))
    assert rows_of(part) == rows_of(whole)


def test_a_stop_within_an_epoch_leaves_no_mark_in_rows_by_epoch(run: Execute) -> None:
    keys = {"record-by": "epoch", "local-steps": 1}
    whole = run(name="whole", **keys)
    assert [row["round"] for row in rows_of(whole)] == [8, 16]
    assert rows_of(run(name="parts", stop_after_rounds=3, **keys)) == []
    assert len(rows_of(run(name="parts", stop_after_rounds=11, **keys))) == 1
    assert rows_of(run(name="parts", **keys)) == rows_of(whole)


def test_a_broken_off_run_goes_on_from_its_last_checkpoint(run: Execute) -> None:
    whole = run(name="whole")
    broken = run(name="broken", stop_after_rounds=5)
    checkpoint = (broken.folder / "checkpoint.pt").read_bytes()
    run(name="broken", stop_after_rounds=7)
    # as if it had been killed while it wrote the row of round 8, its last checkpoint that of round 5
    (broken.folder / "checkpoint.pt").write_bytes(checkpoint)
    with (broken.folder / "metrics.jsonl").open("a") as rows:
        rows.write('{"round": 8, "epo')
    again = run(name="broken")
    assert_same_bits(final_model(again), final_model(whole))
    assert rows_of(again) == rows_of(whole)


def test_centralized_stopped_and_resumed_is_never_stopped_bitwise(run: Execute) -> None:
    keys = {**BN_AND_DROPOUT, "epochs": 3.0, "schedule": "cosine", "schedule-unit": "epoch"}
    whole = run("centralized", name="whole", **keys)
    run("centralized", name="parts", stop_after_epochs=1.0, **keys)
    part = run("centralized", name="parts", **keys)
    assert_same_bits(final_model(part), final_model(whole))
    assert rows_of(part) == rows_of(whole)


def test_cores_and_threads_of_the_pool_change_nothing(run: Execute, monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    for cores in (1, 4):
        monkeypatch.setattr(pool, "cpu_count", lambda cores=cores: cores)
        models.append(final_model(run(name=f"cores-{cores}", **BN_AND_DROPOUT)))
    assert_same_bits(*models)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"momentum-at-sync": "keep"}, {"momentum-at-sync": "reset"}),
        ({"momentum-at-sync": "keep"}, {"momentum-at-sync": "average"}),
        ({"batchnorm-at-sync": "average"}, {"batchnorm-at-sync": "first-worker"}),
        ({"shuffle-every": "epoch", "local-steps": 1}, {"shuffle-every": "round", "local-steps": 1}),
        ({"seed": 1}, {"seed": 2}),
        ({"normalize": "dataset"}, {"normalize": "cifar10"}),
        ({"decay-biases-and-norms": True, "weight-decay": 0.1}, {"decay-biases-and-norms": False, "weight-decay": 0.1}),
    ],
)
def test_a_visible_choice_is_seen(run: Execute, one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = (final_model(run(name=n, **BN_AND_DROPOUT, **keys)) for n, keys in (("a", one), ("b", other)))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_rows_and_summary_tell_the_cost(run: Execute) -> None:
    result = run(name="cost", evaluate_every=3)
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 8  # 2 epochs of 128 images in rounds of 4 clients, 2 steps, 4 images
    last = rows[-1]
    assert (last["round"], last["epoch"], last["steps_done"], last["syncs"]) == (8, 2.0, 16, 8)
    assert last["bytes_down"] == 8 * 4 * 62_006 * 4  # rounds, clients, parameters, bytes
    assert last["bytes_up"] == last["bytes_down"]
    assert last["overhead_bytes_up"] == 4 * 62_006 * 4  # momentum, for the last round's checkpoint
    assert [row["test_accuracy"] is not None for row in rows] == [False, False, True] * 2 + [False, True]
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    summary = read_summary(result.folder)
    assert summary is not None
    assert summary["final_test_accuracy"] == last["test_accuracy"]
    assert summary["best_test_accuracy"] == max(
        row["test_accuracy"] for row in rows if row["test_accuracy"] is not None
    )
    assert all(summary[name] == last[name] for name in ("bytes_up", "overhead_bytes_up", "overhead_bytes_down"))
    assert summary["parameters"] == 62_006
    assert {"device", "commit", "command", "versions", "seconds", "round", "epoch"} <= summary.keys()
    config = json.loads((result.folder / "config.json").read_text())
    assert (config["mode"], config["clients"], config["device"]) == ("localsgd", 4, "cpu")


def test_a_fraction_trains_fewer_clients_for_more_rounds(run: Execute) -> None:
    half = run(name="half", fraction=0.5)
    rows = rows_of(half)
    assert (len(rows), rows[-1]["epoch"]) == (16, 2.0)  # twice the rounds of all 4 clients, for the same samples
    assert rows[-1]["bytes_up"] == 16 * 2 * 62_006 * 4
    parts = run(name="parts", fraction=0.5, stop_after_rounds=5)
    assert_same_bits(final_model(run(name="parts", fraction=0.5)), final_model(half))
    assert parts.folder.name == "parts"


def test_averaged_momentum_travels_with_the_model(run: Execute) -> None:
    kept, averaged = (rows_of(run(name=policy, momentum_at_sync=policy))[-1] for policy in ("keep", "average"))
    assert averaged["bytes_up"] == 2 * kept["bytes_up"]


def test_learning_happens(run: Execute) -> None:
    keys = {"dataset": "synthetic:classes=2,images=256", "batch-size": 8, "lr": 0.05, "epochs": 6.0}
    assert rows_of(run(**keys, evaluate_every=1000))[-1]["test_accuracy"] > 0.8  # chance is 0.5


def test_a_finished_run_is_left_alone_unless_asked(run: Execute) -> None:
    first = run(name="once")
    written = (first.folder / "metrics.jsonl").stat().st_mtime_ns
    assert run(name="once").finished
    assert (first.folder / "metrics.jsonl").stat().st_mtime_ns == written


def test_a_diverging_centralized_run_fails_and_keeps_its_checkpoint(run: Execute, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"the training loss of epoch \d+ is nan: a lower --lr may help"):
        run("centralized", name="diverging", lr=1e6, momentum=0.99, epochs=5.0)
    assert not (tmp_path / "diverging" / "summary.json").exists()


def test_a_stop_that_has_been_passed_changes_nothing(run: Execute) -> None:
    part = run(name="part", stop_after_rounds=3)
    model, rows = final_model(part), rows_of(part)
    part = run(name="part", stop_after_rounds=2)
    assert_same_bits(final_model(part), model)
    assert rows_of(part) == rows


def test_an_early_stop_tells_where_its_rows_come_from(run: Execute) -> None:
    part = run(name="part", stop_after_rounds=2, evaluate_every=3)
    summary = read_summary(part.folder)
    assert summary is not None
    assert (summary["finished"], summary["round"], summary["final_test_accuracy"]) == (False, 2, None)
    assert {"device", "commit", "command", "versions"} <= summary.keys()


def test_another_number_of_nodes_is_an_error_not_a_wait(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the server app meets it, in ``flwr run`` and deployed; nothing of the run is left."""
    monkeypatch.setattr(server_app, "log_errors_in_one_line", lambda: None)
    config = resolve(small.changed({"name": "count"}), "localsgd")
    context = Context(1, 1, {}, RecordDict(), dict(config.as_keys()))
    with (
        InProcessGrid(client_app.app, config.changed({"clients": 3})) as grid,
        pytest.raises(UserError, match="its federation has 3 nodes, not clients = 4: make"),
    ):
        server_app.main(grid, context)
    assert not list(Path(config.results_dir).iterdir())


def test_validation_is_what_the_records_say_was_tested_on(run: Execute) -> None:
    for mode in ("localsgd", "centralized"):
        plain, held = (run(mode, name=f"{mode}-{n}", validation=n, epochs=1.0) for n in (0, 32))
        for result, words in ((plain, "test"), (held, "validation")):
            summary = read_summary(result.folder)
            assert summary is not None
            assert {row["tested_on"] for row in rows_of(result)} == {summary["tested_on"]} == {words}
        assert rows_of(held)[-1]["steps_done"] == rows_of(plain)[-1]["steps_done"] * 96 // 128
        assert rows_of(held)[-1]["test_loss"] != rows_of(plain)[-1]["test_loss"]


def test_records_by_epoch_change_neither_the_model_nor_the_mean_loss(run: Execute) -> None:
    by_round = run(name="rounds", local_steps=3)  # 128 images are 2 2/3 rounds of 4 clients, 3 steps, 4 images
    by_epoch = run(name="epochs", local_steps=3, record_by="epoch")
    assert_same_bits(final_model(by_round), final_model(by_epoch))
    rounds, (first, second) = rows_of(by_round), rows_of(by_epoch)
    assert [row["round"] for row in (first, second)] == [3, 6]  # the first to pass an epoch, and the last
    assert first["train_loss"] == pytest.approx(sum(row["train_loss"] for row in rounds[:3]) / 3)
    assert {**second, "train_loss": 0} == {**rounds[5], "train_loss": 0}


def test_a_run_recorded_by_epoch_goes_on_bitwise(run: Execute) -> None:
    whole = run(name="whole", record_by="epoch", local_steps=3, epochs=4.0)
    part = {"record_by": "epoch", "local_steps": 3, "epochs": 4.0, "checkpoint_every": 1}
    run(name="part", stop_after_rounds=6, **part)
    resumed = run(name="part", **part)
    assert_same_bits(final_model(whole), final_model(resumed))
    assert rows_of(whole) == rows_of(resumed)


def test_a_run_older_than_a_key_is_still_that_run(run: Execute) -> None:
    first = run(name="old")
    path = first.folder / "config.json"
    held = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in held.items() if name != "validation"}))
    assert run(name="old").finished
    with pytest.raises(UserError, match="validation = 0, not 16"):
        run(name="old", validation=16)
