"""docs/models-and-data.md: its code and its commands run as they stand."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from fedsim import cli
from fedsim.config import FIELDS, choices
from fedsim.registry import DATASETS, MODELS
from tests.conftest import NEEDS_FLWR_DATASETS, assert_same_bits, final_model

PAGE = (Path(__file__).parents[1] / "docs" / "models-and-data.md").read_text()


@NEEDS_FLWR_DATASETS
def test_every_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL):
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    commands = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 6
    for line in commands:
        program, *arguments = shlex.split(line)[1:]
        if program != "run.py":
            runpy.run_path(program, run_name="__main__")
            continue
        cpu = ["--device", "cpu"] if arguments[0] == "localsgd" else []
        monkeypatch.setattr(sys, "argv", [program, *arguments, *cpu])
        cli.main()
    assert (tmp_path / "split.png").exists()
    in_order = sorted((tmp_path / "results").iterdir(), key=lambda folder: folder.stat().st_mtime)
    models = [final_model(folder) for folder in in_order]
    assert len(models) == 4
    assert_same_bits(models[1], models[2])  # of the function and of the file


def test_the_page_names_every_model_data_set_and_partition() -> None:
    for name in (*MODELS, *DATASETS, *choices(FIELDS["partition"])):
        assert f"`{name}`" in PAGE, name
