"""docs/models-and-data.md: its code and its commands run as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim.registry import DATASETS, MODELS, PARTITIONS
from tests.conftest import NEEDS_FLWR_DATASETS, assert_same_bits, final_model
from tests.pages import read_page, run_page


@pytest.mark.slow  # what its commands do is tested in tests/models and tests/data
@NEEDS_FLWR_DATASETS
def test_every_example_of_the_page_runs(tmp_path: Path) -> None:
    run_page("models-and-data.md", tmp_path)
    assert (tmp_path / "split.png").exists()
    in_order = sorted((tmp_path / "results").iterdir(), key=lambda folder: folder.stat().st_mtime)
    models = [final_model(folder) for folder in in_order]
    assert len(models) == 10
    assert_same_bits(models[1], models[2])  # of the function and of the file


def test_the_page_names_every_model_data_set_and_partition() -> None:
    page = read_page("models-and-data.md")
    for name in (*MODELS.names, *DATASETS.names, *PARTITIONS.names):
        assert f"`{name}`" in page, name
