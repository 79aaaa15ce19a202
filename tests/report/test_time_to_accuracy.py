from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console

from fedsim.errors import UserError
from fedsim.experiments.study import TWIN
from fedsim.report.load import Group, read_groups
from fedsim.report.network import Network
from fedsim.report.time_to_accuracy import plan_group, plan_results, seconds_an_image

NETWORK = Network(bandwidth=1000, latency=0.5)  # bytes a second, seconds


@pytest.fixture
def group(study: Path) -> Group:
    (found,), _ = read_groups(study)
    return found


def test_the_time_of_each_cell_by_hand(group: Group) -> None:
    planned = {plan.cell.place: plan for plan in plan_group(group, 0.42, NETWORK, compute=0.1)}
    # J = 8, both seeds at round 3: 24 steps; 3 syncs of 2 * 0.5 s; 3 * 1000 bytes up and down of each worker
    assert planned[2, 8].seconds == pytest.approx([2.4 + 3 + 6] * 2)
    # J = 1, seed 1 has 0.43 and 0.42: round 3 too; 24 syncs, 3 * 8000 bytes up and down
    assert planned[2, 1].seconds == pytest.approx([2.4 + 24 + 48] * 2)
    # The twin: a sync a step, 250 parameters of 4 bytes up and down
    assert planned[2, TWIN].seconds == pytest.approx([2.4 + 24 + 24 * 2 * 1000 / 1000] * 2)
    assert planned[2, TWIN].bytes == pytest.approx([24 * 2 * 2 * 1000] * 2)
    assert planned[4, 8].seconds == pytest.approx([2.4 + 3 + 6])  # begun, and already there
    assert (4, TWIN) not in planned


def test_a_shared_link_carries_the_bytes_of_all(group: Group) -> None:
    planned = {plan.cell.place: plan for plan in plan_group(group, 0.42, NETWORK._replace(link="server"), 0.1)}
    assert planned[2, 8].seconds == pytest.approx([2.4 + 3 + 2 * 6] * 2)
    assert planned[4, 8].seconds == pytest.approx([2.4 + 3 + 4 * 6])


def test_measured_compute_is_the_median_seconds_of_an_image_times_a_workers_images(group: Group) -> None:
    # Each row took 2 s for 8 steps of 2 or 4 workers with 16 images: six runs at K = 2 and two at K = 4
    assert seconds_an_image(group) == pytest.approx(2 / (8 * 2 * 16))
    planned = {plan.cell.place: plan for plan in plan_group(group, 0.42, NETWORK, compute=None)}
    assert [plan.compute for plan in planned.values()] == pytest.approx([2 / (8 * 2)] * 5)  # the twin's share is 16 too
    assert planned[2, 8].seconds == pytest.approx([24 * 0.125 + 3 + 6] * 2)


def test_runs_that_never_reach_the_target_are_counted_and_named(study: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    plan_results(study, 0.54, NETWORK, 0.1, tmp_path / "plan", "run.py plan", console)
    lines = {line.split("│")[1].strip(): line for line in console.export_text().splitlines() if line.count("│") > 5}
    assert "1 of 2" in lines["K = 2, J = 8"]  # the other seed's best is 53 %
    assert "never (best 45.00 %)" in lines["K = 2, J = 1"]
    assert "not yet (best 53.00 %)" in lines["K = 4, J = 8"]
    with (tmp_path / "plan" / "plan-mine.csv").open() as file:
        rows = {row["cell"]: row for row in csv.DictReader(file)}
    assert float(rows["K = 2, J = 8"]["seconds_mean"]) == pytest.approx(11.4)
    assert (rows["K = 2, J = 1"]["reached"], rows["K = 2, J = 1"]["seconds_mean"]) == ("0", "")
    assert (tmp_path / "plan" / "plan-mine.png").read_bytes().startswith(b"\x89PNG")


def test_a_target_is_a_fraction(study: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="target = 50 is no accuracy"):
        plan_results(study, 50, NETWORK, None, tmp_path, "", Console())
