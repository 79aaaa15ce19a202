"""Keys of earlier versions, in folders of results and on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedsim.config import ARGUMENTS, BUDGET, Config
from fedsim.experiments.migrate import migrate
from fedsim.experiments.study import read_study
from fedsim.runs.folder import CONFIG, read_config
from fedsim.spellings import MOVED, OTHERS, RENAMED, now, present
from tests.conftest import Call


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"optimizer": "lars", "trust-coefficient": 0.05, "lamb-clamp": 10.0}, {"optimizer": "lars:trust=0.05"}),
        ({"trust-coefficient": 0.05}, {"optimizer.trust": 0.05}),
        (
            {"optimizer": "adamw", "optimizer-args": "betas=0.9:0.95, eps=1e-6"},
            {"optimizer": "adamw:betas=0.9/0.95,eps=1e-6"},
        ),
        ({"outer-args": "lr=1, betas=0.9:0.999"}, {"outer.lr": "1", "outer.betas": "0.9/0.999"}),
        ({"outer-args": ["lr=0.01", "lr=0.1"]}, {"outer.lr": [0.01, 0.1]}),
        ({"strategy": "localsgd", "outer": "slowmo"}, {"outer": "slowmo"}),
        ({"strategy": "a.b:C", "strategy-args": "eta=0.1", "outer": "none"}, {"outer": "a.b:C:eta=0.1"}),
        (
            {"schedule": "multistep", "milestones": "50,60", "gamma": 0.1},
            {"schedule": "multistep:milestones=50/60,gamma=0.1"},
        ),
        ({"schedule": "cosine", "milestones": "", "gamma": 0.1}, {"schedule": "cosine"}),
        ({"reference-batch": 256, "scaling": "sqrt"}, {"lr-scaling": "sqrt:batch=256"}),
        ({"lr-scaling-batch": [0, 256]}, {"lr-scaling": ["none", "linear:batch=256"]}),
        (
            {"compress": "topk", "compress-down": "int8", "compress-ratio": 0.1},
            {"compress": "topk:ratio=0.1", "compress-down": "int8"},
        ),
        ({"compress": "topk+int8", "compress-ratio": 0.1}, {"compress": "topk:ratio=0.1+int8"}),
        ({"delay": 1}, {"layer": "delay"}),
        ({"augment": "crop+mirror", "crop-size": 24}, {"augment": "crop:size=24+mirror"}),
        ({"augment": "none", "crop-size": 24, "crop-padding": 0}, {"augment": "center:size=24,padding=0"}),
        (
            {"local-steps-schedule": "table", "local-steps-table": "10:1,50:16"},
            {"local-steps-schedule": "table:epochs=10/50,steps=1/16"},
        ),
        (
            {"decay-on": "matrices", "batchnorm-at-sync": "worker-0"},
            {"decay-biases-and-norms": False, "batchnorm-at-sync": "first-worker"},
        ),
    ],
)  # fmt: skip
def test_former_keys_are_written_as_now(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert present(before) == after
    assert present(after) == after


def test_no_former_key_is_one_of_now_and_each_names_one() -> None:
    keys = Config().as_keys()
    for former in {*MOVED, *OTHERS, *RENAMED}:
        assert now(former).split()[0].removeprefix("--") in keys
        assert former not in keys


def test_a_former_key_is_told_how_it_is_written_now(call: Call) -> None:
    code, _, err = call("localsgd", "--trust-coefficient", "0.1")
    assert code == 2
    assert err == "error: --trust-coefficient is written --optimizer lars:trust=VALUE now\n"
    code, _, err = call("localsgd", "--no-nesterov")
    assert (code, err) == (2, "error: --no-nesterov is written --optimizer sgdm:nesterov=VALUE now\n")


OLD_RUN = {
    "mode": "localsgd",
    "dataset": "synthetic",
    "synthetic-images": 96,
    "model": "lenet5",
    "optimizer": "sgdm",
    "nesterov": True,
    "lr-scaling-batch": 0,
    "clients": 4,
    "batch-size": 8,
    "local-steps": 2,
    "compress": "topk",
    "compress-ratio": 0.1,
    "delay": 0,
    "strategy": "localsgd",
    "seed": 3,
    "device": "cpu",
    "threads": 1,
}
OLD_STUDY = """
title = "old"
mode = "localsgd"

[grid]
lr-scaling-batch = [0, 16]
seed = [3]

[set]
dataset = "synthetic"
synthetic-images = 96
model = "lenet5"
nesterov = true
clients = 4
batch-size = 8
local-steps = 2
compress = "topk"
compress-ratio = 0.1
"""


def old_folder(root: Path) -> Path:
    folder = root / "old"
    (folder / "lr-scaling-batch0-seed3").mkdir(parents=True)
    (folder / "lr-scaling-batch0-seed3" / CONFIG).write_text(json.dumps(OLD_RUN))
    (folder / "study.toml").write_text(OLD_STUDY)
    return folder


def test_a_folder_is_migrated_once_and_its_runs_have_the_names_of_their_cells(tmp_path: Path, call: Call) -> None:
    folder = old_folder(tmp_path)
    code, _, err = call("report", str(tmp_path), "-o", str(tmp_path / "report"))
    assert code == 2 or "fedsim migrate" in err

    changed = migrate(tmp_path)
    assert len(changed) == 3  # a configuration, a study, and the name of a run
    held = read_config(folder / "none-seed3")
    assert held["compress"] == "topk:ratio=0.1"
    assert held["optimizer"] == "sgdm:nesterov=true"
    assert held[ARGUMENTS]["optimizer"] == {"sgdm": {"nesterov": True}}
    assert held[BUDGET] == "to a round"  # as earlier versions met it
    study = read_study(str(folder / "study.toml"))
    assert [cell.config.name for cell in study.cells()] == ["none-seed3", "linear-batch=16-seed3"]
    assert migrate(tmp_path) == []


def test_a_record_of_an_earlier_version_is_refused_with_the_command_that_rewrites_it(
    tmp_path: Path, call: Call
) -> None:
    folder = old_folder(tmp_path)
    shutil.move(folder / "lr-scaling-batch0-seed3", folder / "run")
    code, _, err = call("localsgd", "--resume", "run", "--results-dir", str(folder))
    assert code == 2
    assert err.count("\n") == 1
    assert "its key compress-ratio is of another version of fedsim: fedsim migrate FOLDER rewrites older ones" in err
