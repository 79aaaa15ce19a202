from __future__ import annotations

from pathlib import Path

import pytest

from fedsim.config import Config
from fedsim.report.answers import answers
from fedsim.report.differences import paired_differences
from fedsim.report.result_table import read_tables
from tests.conftest import write_run


def told(root: Path) -> list[str]:
    (table,), _ = read_tables(root)
    return answers(table, paired_differences(table))


def test_what_more_local_steps_cost_at_every_k(study: Path) -> None:
    assert told(study) == [
        "J = 8 instead of J = 1: +10.00 ± 0.00 points at K = 2 (8 times fewer bytes) (2 seeds).",
        "K = 2, against J = 1: J = 8 +10.00 ± 0.00 (8 times fewer bytes), large batch +0.00 ± 0.00.",
    ]


def test_one_worker_has_no_bytes_to_compare(tmp_path: Path) -> None:
    for steps, final in ((1, 0.5), (4, 0.4)):
        write_run(tmp_path / "s" / f"{steps}", Config(clients=1, local_steps=steps), "localsgd", [0.1, final])
    assert told(tmp_path)[0] == "J = 4 instead of J = 1: −10.00 points (one seed)."


def test_methods_are_above_below_or_not_told_apart(tmp_path: Path) -> None:
    finals = {"none": (0.40, 0.42, 0.41), "slowmo": (0.45, 0.47, 0.461), "diloco": (0.3, 0.32, 0.311),
              "fedavgm": (0.43, 0.39, 0.42)}  # fmt: skip
    for outer, accuracies in finals.items():
        for seed, final in enumerate(accuracies):
            for steps in (1, 2) if outer == "none" else (1,):
                config = Config().changed({"outer": outer, "local-steps": steps, "seed": seed})
                write_run(tmp_path / "s" / f"{outer}-{steps}-{seed}", config, "localsgd", [0.1, final])
    toml = 'title = "t"\nmode = "localsgd"\nabout = "outer"\n[grid]\nouter = ["none", "slowmo", "diloco", "fedavgm"]\n'
    (tmp_path / "s" / "study.toml").write_text(f"{toml}local-steps = [1, 2]\nseed = [0, 1, 2]\n")
    assert told(tmp_path) == [
        "Against outer = none, above: slowmo; below: diloco; not told apart: fedavgm (3 seeds).",
        "J = 1, against outer = none: slowmo +5.03 ± 0.14, fedavgm +0.33 ± 7.59, diloco −9.97 ± 0.14.",
    ]


def test_values_that_hardly_differ_are_one_sentence(tmp_path: Path) -> None:
    for precision, seed, final in (("fp32", 1, 0.5), ("bf16", 1, 0.501), ("fp32", 2, 0.5), ("bf16", 2, 0.498)):
        config = Config().changed({"precision": precision, "seed": seed})
        write_run(tmp_path / "s" / f"{precision}{seed}", config, "localsgd", [0.1, final])
    assert told(tmp_path) == [
        "The 2 values of precision differ by at most 0.05 points: −0.05 ± 1.91, they cannot be told apart (2 seeds)."
    ]


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    for outer, final in (("none", 0.5), ("slowmo", 0.6), ("diloco", 0.4)):
        write_run(tmp_path / "s" / outer, Config().changed({"outer": outer}), "localsgd", [0.1, final])
    assert told(tmp_path)[0] == (
        "Against outer = none: slowmo +10.00 points, diloco −10.00 points (one seed, so no interval)."
    )


@pytest.mark.parametrize("finished", [True, False])
def test_runs_that_differ_in_many_keys_have_a_best_one(tmp_path: Path, finished: bool) -> None:
    for lr, final in ((0.1, 0.2), (0.2, 0.4)):
        config = Config(lr=lr, momentum=lr, weight_decay=lr, warmup_epochs=lr)
        write_run(tmp_path / "s" / f"{lr}", config, "centralized", [0.1, final], finished)
    said = "Highest: 40.00 % at 0.2; lowest: 20.00 % at 0.1."
    assert told(tmp_path) == [said if finished else "No run is finished: accuracies are those so far."]
