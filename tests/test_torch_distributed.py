"""docs/torch-distributed.md: its script trains what fedsim trains."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from tests.conftest import final_model
from tests.pages import run_page


def test_the_script_of_the_page_trains_what_fedsim_trains(tmp_path: Path) -> None:
    assert "the same parameters" in run_page("torch-distributed.md", tmp_path)
    script = torch.load(tmp_path / "final.pt")
    run = final_model(tmp_path / "results" / "same")
    assert script.keys() == run.keys()
    spec = importlib.util.spec_from_file_location("small", tmp_path / "small.py")
    assert spec
    assert spec.loader
    spec.loader.exec_module(small := importlib.util.module_from_spec(spec))
    with torch.random.fork_rng():
        initial = small.build(4).state_dict()
    for name, value in script.items():
        assert (value - run[name]).abs().max() < 1e-5, name
        assert (value - initial[name]).abs().max() > 0.01, name
