"""A few steps on the real CIFAR-100, where it is present."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

from fedsim.config import Config
from fedsim.device import resolve
from fedsim.experiments.execute import execute
from tests.conftest import assert_same_bits, final_model, rows_of

ROOT = Path(__file__).parents[1]


def test_table_2s_first_rounds_are_the_same_on_both_engines(real_data: str, tmp_path: Path) -> None:
    table2 = "localsgd --preset table2 --clients 4 --local-steps 10 --stop-after-rounds 2 --device cpu".split()
    for name, engine in (("here", []), ("flower", ["--engine", "flower"])):
        place = ["--data-dir", real_data, "--results-dir", str(tmp_path), "--name", name, *engine]
        command = [sys.executable, str(ROOT / "run.py"), *table2, *place]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    assert_same_bits(final_model(tmp_path / "here"), final_model(tmp_path / "flower"))
    assert rows_of(tmp_path / "here") == rows_of(tmp_path / "flower")


def test_lenet5_begins_to_learn(real_data: str, tmp_path: Path) -> None:
    keys = {"model": "lenet5", "lr": 0.05, "batch-size": 128, "epochs": 1.0, "device": "cpu"}
    config = Config().changed({**keys, "data-dir": real_data, "results-dir": str(tmp_path), "name": "lenet5"})
    (row,) = rows_of(execute(resolve(config, "centralized"), "centralized"))
    assert row["train_loss"] < math.log(100)
    assert row["test_accuracy"] > 0.04  # chance is 0.01
