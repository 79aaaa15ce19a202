"""The notebook in docs/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs/first-study.ipynb"


def test_the_cells_of_the_notebook_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSIM_CORES", "1")
    matplotlib.use("agg")
    names: dict[str, Any] = {}
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        assert cell["outputs"] == []
        exec("".join(cell["source"]), names)
    runs = names["found"].runs
    assert runs.set_index("local_steps")["syncs"].to_dict() == {1: 48, 4: 12, 8: 6}  # of 6 epochs of 8 steps each
    assert names["rows"]["local_steps"].value_counts().to_dict() == {1: 6, 4: 6, 8: 6}
