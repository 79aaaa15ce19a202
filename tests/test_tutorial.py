"""docs/tutorial.md: its code runs as it stands, and shows what the page says."""

from __future__ import annotations

import re
from pathlib import Path

from fedsim.runs.folder import read_config
from fedsim.runs.records import read_summary
from tests.conftest import NEEDS_FLWR_DATASETS
from tests.pages import read_page, run_page


def accuracy(folder: Path) -> float:
    return (read_summary(folder) or {})["final_test_accuracy"]  # type: ignore[no-any-return]


@NEEDS_FLWR_DATASETS
def test_the_tutorial_runs_as_it_stands(tmp_path: Path) -> None:
    output = run_page("tutorial.md", tmp_path)
    results = tmp_path / "results"
    cells = {f"{split}-j{steps}" for split in ("iid", "dirichlet-alpha=0.3") for steps in (2, 8)}
    assert {run.name for run in (results / "uneven").glob("*/")} == {
        f"{cell}-seed{seed}" for cell in cells for seed in (1, 2)
    }
    assert accuracy(results / "first") > 0.7  # of five classes
    even, uneven = (
        sum(accuracy(results / "uneven" / f"{split}-j8-seed{seed}") for seed in (1, 2))
        for split in ("iid", "dirichlet-alpha=0.3")
    )
    assert even > uneven
    assert "4 clients hold 1,000 of 1,000 training" in output
    split = re.search(r"```text\n( client +images.*?)```", read_page("tutorial.md"), re.DOTALL)
    assert split
    assert split[1].split() == output[output.index(" client  images") :].split()[: len(split[1].split())]
    sent = [(read_summary(results / name) or {})["bytes_up"] for name in ("plain", "weighted-int8")]
    assert sent[1] < sent[0] / 2
    assert read_config(results / "plain")["partition"] == "dirichlet:alpha=0.3"
    made = ("split.png", "on-a-network/bandwidth-uneven-iid.png", "report/index.html")
    assert all((tmp_path / file).stat().st_size for file in made)
