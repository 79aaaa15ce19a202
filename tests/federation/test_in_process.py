"""The clients of one process: trained in groups, by as many threads as there are cores."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from flwr.app import Context, Message

from fedsim.config import Config, Engine
from fedsim.device import CORES, resolve
from fedsim.experiments.execute import execute
from fedsim.federation import client_app
from fedsim.federation.in_process import InProcessGrid, stacked_trainers
from fedsim.federation.server_app import train_localsgd
from fedsim.runs.records import read_summary
from fedsim.runs.run import Run
from fedsim.training.local_round import RoundEnd, RoundStart, take_local_round
from fedsim.training.stacked import StackedWorkers
from tests.conftest import Execute, assert_same_bits, final_model, rows_of

FIVE: dict[str, Any] = {
    "clients": 5,
    "dataset.images": 160,
    "model": "tests.own_code:batchnorm",
    "augment.size": 12,
    "batch-size": 4,
    "rounds": 3,
    "lr": 0.05,
}


def test_a_round_is_divided_among_the_trainers_which_work_at_the_same_time(
    small: Config, run: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CORES, "2")
    whole = run(name="whole", **FIVE)
    both = threading.Barrier(2, timeout=60)
    seen: list[tuple[int, list[Any], int]] = []

    def one_by_one(config: Config, starts: Sequence[RoundStart]) -> list[RoundEnd]:
        return [take_local_round(config, start) for start in starts]

    def trainer(number: int, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        both.wait()
        workers = [context.node_config["partition-id"] for context in contexts]
        seen.append((number, workers, torch.get_num_threads()))
        return client_app.train_together(one_by_one, messages, contexts)

    config = resolve(small.changed({**FIVE, "name": "divided"}), "localsgd")
    divided = Run(config, "localsgd")
    trainers = [lambda *group: trainer(0, *group), lambda *group: trainer(1, *group)]
    with InProcessGrid(client_app.app, config, trainers) as grid:
        train_localsgd(grid, config, divided)
    assert sorted(seen) == [(0, [0, 1], 1)] * 3 + [(1, [2, 3, 4], 1)] * 3
    assert_same_bits(final_model(divided), final_model(whole))
    assert rows_of(divided) == rows_of(whole)


@pytest.mark.parametrize(("cores", "threads", "groups"), [(8, 1, 8), (8, 3, 2), (2, 4, 1)])
def test_there_is_a_group_for_each_thread_of_the_pool(
    small: Config, monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, groups: int
) -> None:
    monkeypatch.setenv(CORES, str(cores))
    assert len(stacked_trainers(small.changed({"threads": threads}))) == groups
    assert len(stacked_trainers(small.changed({"threads": threads, "device": "cuda"}))) == 1


@pytest.mark.parametrize(
    "keys",
    [
        {"batchnorm-at-sync": "local", "local-rule": "scaffold", "fraction": 0.8},
        {"optimizer": "lars:trust=0.05", "momentum-at-sync": "average"},
        {"optimizer": "lamb", "layer": "delay", "lr": 0.001},
    ],
)
def test_stacked_in_groups_of_any_size_is_one_by_one(
    small: Config, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    """In float64, to its rounding: groups of 5, of 2 and 3, and of 1, 2 and 2."""
    config = resolve(small.changed({**FIVE, "precision": "fp64", **keys}), "localsgd")
    expected = final_model(execute(config.changed({"name": "one-by-one"}), "localsgd"))
    for cores in ("1", "2", "3"):
        monkeypatch.setenv(CORES, cores)
        found = final_model(execute(config.changed({"name": f"on-{cores}"}), "localsgd", "stacked"))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-11)


def test_stacked_in_groups_is_resumed_bitwise(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CORES, "2")
    keys = {**FIVE, "rounds": 6, "fraction": 0.8, "schedule": "cosine", "batchnorm-at-sync": "local"}
    config = resolve(small.changed(keys), "localsgd")
    whole = execute(config.changed({"name": "whole"}), "localsgd", "stacked")
    execute(config.changed({"name": "parts", "stop-after-rounds": 3}), "localsgd", "stacked")
    parts = execute(config.changed({"name": "parts"}), "localsgd", "stacked")
    assert_same_bits(final_model(parts), final_model(whole))
    assert rows_of(parts) == rows_of(whole)


@pytest.mark.parametrize("engine", ["stacked", "local"])
def test_a_stacked_run_that_is_resumed_in_other_groups_warns_in_a_line(
    small: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], engine: Engine
) -> None:
    """Its groups are recorded: one for each core, as far as there are clients. No other engine depends on them."""
    config = resolve(small.changed({**FIVE, "name": "parts", "rounds": 5}), "localsgd")
    warnings = []
    for rounds, cores in ((1, "2"), (2, "2"), (3, "8"), (4, "5"), (5, "2")):
        monkeypatch.setenv(CORES, cores)
        run = execute(config.changed({"stop-after-rounds": rounds}), "localsgd", engine)
        warnings.append(capsys.readouterr().err)
        groups = min(int(cores), 5) if engine == "stacked" else None
        checkpoint = torch.load(run.folder / "checkpoint.pt", weights_only=True)
        assert checkpoint.get("groups") == (read_summary(run.folder) or {}).get("groups") == groups
    warned = [2, 4] if engine == "stacked" else []
    assert [round for round, warning in enumerate(warnings) if warning] == warned
    if engine == "stacked":
        assert warnings[2] == (
            "warning: name = parts: engine = stacked trained the clients in 2 groups so far, one for each core, and "
            "does in 5 here: the last bits will differ from those of an uninterrupted run: set FEDSIM_CORES as before, "
            "if they must not\n"
        )


def test_a_group_that_fails_is_left_out_and_the_others_are_averaged(small: Config) -> None:
    config = resolve(small.changed({**FIVE, "name": "halved", "rounds": 1}), "localsgd")

    def broken(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        raise KeyError("lost")

    trainer = functools.partial(client_app.train_together, StackedWorkers().take_rounds)
    run = Run(config, "localsgd")
    with InProcessGrid(client_app.app, config, [trainer, broken]) as grid:
        train_localsgd(grid, config, run)
    (row,) = rows_of(run)
    assert sorted(row["left_out"]) == ["2", "3", "4"]
