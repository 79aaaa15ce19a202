from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.experiments.study import LARGE_BATCH
from fedsim.network import Network
from fedsim.report.bandwidths import BANDWIDTHS, fastest_cells, plot_bandwidths, seconds_by_bandwidth
from fedsim.report.result_table import ResultTable, read_tables
from fedsim.report.stragglers import Stragglers
from fedsim.report.time_to_accuracy import Plan, seconds_per_image, time_table, time_to_accuracy, times_to_target
from tests.conftest import write_run

NETWORK = Network(bandwidth=1000, latency=0.5)  # bytes per second, seconds
NONE = Stragglers()
PLAN = Plan(0.42, NETWORK, compute=0.1)


def seconds(
    table: ResultTable, network: Network = NETWORK, compute: float | None = 0.1, stragglers: Stragglers = NONE
) -> dict[object, float]:
    times = times_to_target(table, Plan(0.42, network, compute, stragglers))
    return dict(zip(times["coords"], times["seconds"], strict=True))


def test_the_time_of_each_cell_by_hand(table: ResultTable) -> None:
    found = seconds(table)
    # J = 8, both seeds at round 3: 24 steps; 3 syncs of 2 * 0.5 s; 3 * 1000 bytes up and down of each worker
    assert found[2, 8] == pytest.approx(2.4 + 3 + 6)
    # J = 1, seed 1 has 0.43 and 0.42: round 3 too; 24 syncs, 3 * 8000 bytes up and down
    assert found[2, 1] == pytest.approx(2.4 + 24 + 48)
    # The large batch: a sync a step, 250 parameters of 4 bytes up and down
    assert found[2, LARGE_BATCH] == pytest.approx(2.4 + 24 + 24 * 2 * 1000 / 1000)
    assert found[4, 8] == pytest.approx(2.4 + 3 + 6)  # unfinished, and already there
    assert (4, LARGE_BATCH) not in found


def test_a_shared_link_carries_the_bytes_of_all(table: ResultTable) -> None:
    found = seconds(table, NETWORK._replace(link="server"))
    assert found[2, 8] == pytest.approx(2.4 + 3 + 2 * 6)
    assert found[4, 8] == pytest.approx(2.4 + 3 + 4 * 6)


def test_measured_compute_is_the_median_seconds_of_an_image_times_a_workers_images(table: ResultTable) -> None:
    # Each row took 2 s for 8 steps of 2 or 4 workers with 16 images: six runs at K = 2 and two at K = 4
    assert seconds_per_image(table) == pytest.approx(2 / (8 * 2 * 16))
    times = times_to_target(table, Plan(0.42, NETWORK))
    assert list(times["compute_s"]) == pytest.approx([2 / (8 * 2)] * 5)  # the baseline's share is 16 too
    assert seconds(table, compute=None)[2, 8] == pytest.approx(24 * 0.125 + 3 + 6)


def test_where_the_mean_may_be_late_a_round_takes_what_takes_longer(tmp_path: Path) -> None:
    for delay in (0, 1):
        folder = write_run(
            tmp_path / f"{delay}", Config(clients=2, layer="delay" if delay else "none"), "localsgd", [0.1, None, 0.5]
        )
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows[2] |= {"steps_done": 60}  # 10, 10 and 40 steps
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (table,), _ = read_tables(tmp_path)
    # A sync: 1 s of latency, and 500 bytes up and down of each worker
    assert seconds(table) == pytest.approx({("none",): 6 + 3 * 2, ("delay",): 2 + 2 + 4})
    times = times_to_target(table, PLAN)
    by_bandwidth = seconds_by_bandwidth(times, NETWORK)
    assert by_bandwidth.loc[1e11].to_list() == pytest.approx([6, 6 + 3], rel=1e-6)
    slow = NETWORK._replace(bandwidth=100)
    assert seconds(table, slow) == pytest.approx({("none",): 6 + 3 * 11, ("delay",): 3 * 11})
    assert seconds_by_bandwidth(times_to_target(table, PLAN._replace(network=slow)), slow).loc[1e11].to_list() == (
        pytest.approx([6, 6 + 3], rel=1e-6)
    )


def test_one_worker_takes_as_long_as_its_large_batch_baseline(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(
        'title = "One"\nmode = "localsgd"\ntwins = true\n[grid]\nclients = [1]\nlocal-steps = [1]\n'
    )
    write_run(tmp_path / "k1-j1", Config(clients=1, local_steps=1), "localsgd", [0.1, 0.5], bytes_up=5e6)
    write_run(tmp_path / "twin", Config(clients=1), "centralized", [0.1, 0.5], steps_done=10, syncs=0)
    (table,), _ = read_tables(tmp_path)
    assert seconds(table) == pytest.approx({(1, 1): 2.0, (1, LARGE_BATCH): 2.0})


def test_the_resolution_is_told_and_a_smaller_deviation_is_not(study: Path, table: ResultTable) -> None:
    times = times_to_target(table, PLAN).set_index("coords")
    # Tests at rounds 1 and 3: 16 steps, 2 syncs and 2 * 2000 bytes of each worker between them
    assert times["resolution"][2, 8] == pytest.approx(1.6 + 2 + 4)
    assert times["seconds_std"][2, 8] == 0
    assert "±" not in str(time_table(times.reset_index(), table, PLAN))
    path = study / "k2-j8-seed2" / "metrics.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first.replace('"test_accuracy": 0.1', '"test_accuracy": 0.43'), *rest]))
    (table,), _ = read_tables(study)
    text = {row[0].text: row for row in time_table(times_to_target(table, PLAN), table, PLAN).rows}
    # 3.8 and 11.4 s, each 3.8 or 7.6 s after the test before
    assert [entry.text for entry in text["K = 2, J = 8"][1:3]] == ["7.6", "5.7"]


def run(root: Path, target: float, out: Path) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    time_to_accuracy(str(root), PLAN._replace(target=target), str(out), "run.py time-to-accuracy", console)
    return console.export_text()


def test_cells_that_never_reach_the_target_are_named_and_drawn(study: Path, tmp_path: Path) -> None:
    text = run(study, 0.54, tmp_path / "out")
    lines = {line[:20].strip(): line for line in text.splitlines() if line.startswith(" K = ")}
    assert "1 of 2" in lines["K = 2, J = 8"]  # the other seed's best is 53 %
    assert "never (best 45.00 %)" in lines["K = 2, J = 1"]
    assert "not yet (best 53.00 %)" in lines["K = 4, J = 8"]
    with (tmp_path / "out" / "time-to-accuracy-mine.csv").open() as file:
        rows = {row["cell"]: row for row in csv.DictReader(file)}
    assert float(rows["K = 2, J = 8"]["seconds_mean"]) == pytest.approx(11.4)
    assert (rows["K = 2, J = 1"]["reached"], rows["K = 2, J = 1"]["seconds_mean"]) == ("0", "")
    assert "Not reached by every run of: K = 2, J = 1; K = 2, J = 8; K = 4, J = 1; K = 4, J = 8" in text
    assert (tmp_path / "out" / "bandwidth-mine.png").read_bytes().startswith(b"\x89PNG")


def test_traffic_counts_by_direction_and_overhead_not_at_all(study: Path) -> None:
    run = study / "k2-j8-seed1" / "metrics.jsonl"
    run.write_text(run.read_text().replace('"bytes_up"', '"version": 2, "overhead_bytes_up": 500, "bytes_up"'))
    (table,), _ = read_tables(study)
    found = seconds(table, NETWORK._replace(upload=500.0))
    assert found[2, 8] == pytest.approx(2.4 + 3 + 3 * (2 + 1))
    # Round a ring of two: once its own 3000 bytes; 2 messages a sync
    ring = NETWORK._replace(link="all-reduce")
    assert seconds(table, ring)[2, 8] == pytest.approx(2.4 + 3 + 3)
    assert seconds(table, ring)[4, 8] == pytest.approx(2.4 + 3 * 3 + 3 * 1.5)


def test_updates_for_a_strategy_of_flowers_are_not_summed_on_their_way(study: Path) -> None:
    ring = NETWORK._replace(link="all-reduce", latency=0.0)
    (table,), _ = read_tables(study)
    for config in study.glob("*/config.json"):
        held = json.loads(config.read_text())
        if held["mode"] == "localsgd":
            config.write_text(json.dumps({**held, "outer": "flwr.serverapp.strategy:FedMedian"}))
    tables, _ = read_tables(study)  # the large-batch baseline's rows are now a table of their own
    gathered = next(found for each in tables if (4, 8) in (found := seconds(each, ring)))
    assert gathered[4, 8] == pytest.approx(2.4 + 3 * 3)
    assert seconds(table, ring)[4, 8] == pytest.approx(2.4 + 3 * 1.5)


def test_a_round_waits_for_its_slowest_worker(table: ResultTable) -> None:
    found = seconds(table, stragglers=Stragglers(slow=1, factor=2.5))
    assert found == pytest.approx({cell: value + 1.5 * 2.4 for cell, value in seconds(table).items()})
    # With jitter as many waits as rounds: K = 4, J = 8 waits less often than the large batch, K = 2 for two only
    plain, jittered = seconds(table), seconds(table, stragglers=Stragglers("exponential"))
    waits = {cell: (jittered[cell] - value) / 0.1 for cell, value in plain.items()}
    assert waits[2, 1] == pytest.approx(24 * 0.5, rel=0.05)  # the mean maximum of two exponentials is 1.5
    assert waits[2, LARGE_BATCH] == waits[2, 1]
    assert 0 < waits[2, 8] < waits[4, 8] < waits[2, 1]


def test_the_fastest_cell_is_named_at_every_bandwidth(study: Path, tmp_path: Path, table: ResultTable) -> None:
    network = NETWORK._replace(bandwidth=1e6 / 8)
    times = times_to_target(table, PLAN._replace(network=network))
    by_bandwidth = seconds_by_bandwidth(times, network)
    assert list(by_bandwidth.loc[1e6]) == pytest.approx(list(times["seconds"][by_bandwidth.columns]))
    for cell, low, high in fastest_cells(by_bandwidth):
        for bandwidth in (bandwidth for bandwidth in BANDWIDTHS if low <= bandwidth < high):
            assert by_bandwidth.loc[bandwidth, cell] == by_bandwidth.loc[bandwidth].min()
    # The first cell takes 1 s and 2 s at 1 Mbit/s, the second 2 s: they are equal at 2 Mbit/s
    crossing = times.loc[[0, 1]].assign(computing=[1.0, 2.0], waiting=0.0, transfer=[2.0, 0.0], reached=2, runs=2)
    assert fastest_cells(seconds_by_bandwidth(crossing, network)) == [
        (1, 1e6, pytest.approx(2e6, rel=0.13)), (0, pytest.approx(2e6, rel=0.13), 1e11)
    ]  # fmt: skip
    plot = plot_bandwidths(crossing, table, 0.42, network)
    assert "Fastest, named above: K = 2, J = 8 to 2" in plot.caption
    assert plot.caption.endswith("K = 2, J = 1 above.")
    names = [text.get_text() for text in plot.figure.axes[0].texts]
    assert "K = 2\nJ = 1" in names
    assert plot.numbers.groupby("bits_per_second")["fastest"].sum().min() == 1


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"fraction": 0.5}, "the run samples 2 of 4 clients in a round"),
        ({"topology": "ring"}, "the clients of the run do not average over all"),
    ],
)
def test_an_all_reduce_of_some_clients_is_refused(tmp_path: Path, keys: dict[str, Any], problem: str) -> None:
    write_run(tmp_path / "some" / "one", Config(clients=4).changed(keys), "localsgd", [0.5])
    with pytest.raises(UserError, match=f"link = all-reduce: {problem}"):
        time_to_accuracy(
            str(tmp_path), PLAN._replace(network=NETWORK._replace(link="all-reduce")), "out", "", Console(quiet=True)
        )


def test_runs_of_no_study_have_times_too(tmp_path: Path) -> None:
    write_run(tmp_path / "some" / "only", Config(), "localsgd", [0.1, 0.5])
    assert "some: time to 40 % accuracy" in run(tmp_path, 0.4, tmp_path / "out")
    for lr in (0.1, 0.2):
        write_run(tmp_path / "some" / f"lr{lr}", Config(lr=lr), "localsgd", [0.1, 0.5])
    assert "lr = 0.2" in run(tmp_path, 0.4, tmp_path / "out")


def test_a_target_is_a_fraction(study: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="target = 50 is not an accuracy"):
        run(study, 50, tmp_path)
