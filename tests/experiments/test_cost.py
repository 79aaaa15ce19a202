from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.config import Config
from fedsim.data.partition import images_of_epoch
from fedsim.errors import UserError
from fedsim.experiments.cost import (
    REFERENCE_FLOPS,
    Links,
    Pace,
    cost,
    flop_per_image,
    links,
    list_studies,
    measured_rates,
    plan_lines,
    traffic,
)
from fedsim.experiments.study import Cell
from fedsim.runs.records import read_rows
from tests.conftest import SMALL_BATCHNORM, Execute, rows_of, write_run


def test_the_cost_of_a_run_by_hand() -> None:
    table2 = Config(clients=4, local_steps=10, rounds=200)
    assert cost(table2, "localsgd") == (200 * 10 * 4 * 64, 2000, 200)
    assert cost(Config(batch_size=256, epochs=2.0), "centralized") == (100_000, 2 * 196, 0)
    assert cost(Config(batch_size=256, epochs=2.0, validation=5000), "centralized") == (90_000, 2 * 176, 0)


def test_the_flop_of_a_step_by_hand() -> None:
    """A multiply-add is 2; each layer has a product forward, one for its weights' gradient, one for its inputs'."""
    convolutions = [28 * 28 * 6 * 25 * 3, 10 * 10 * 16 * 25 * 6]
    products = [400 * 120, 120 * 84, 84 * 10]
    assert flop_per_image(Config(model="lenet5", dataset="synthetic")) == 2 * (
        3 * sum([*convolutions, *products]) - convolutions[0]
    )  # the images need none


def seconds_of(name: str, lines: list[str]) -> float:
    (number,) = (number for number, line in enumerate(lines) if line.startswith(f"{name}: "))
    *_, amount, unit = lines[number + 1].split()
    return float(amount.replace(",", "")) * {"hours": 3600, "minutes": 60}[unit]


def test_the_list_counts_the_hours_of_a_model_by_its_flop(tmp_path: Path) -> None:
    flop = {name: flop_per_image(Config(model=name)) for name in ("lenet-bn", "lenet5")}
    lines = list(list_studies([], Pace(tmp_path)))
    for name, images, model in (("table1", 18 * 3 * 100 * 50_000, "lenet-bn"), ("scaled-small", 24_000_000, "lenet5")):
        expected = images * flop[model] / REFERENCE_FLOPS
        assert seconds_of(name, lines) == pytest.approx(expected, rel=0.02, abs=180)  # to a tenth of an hour
    assert lines[-1].startswith("Times: one run after the other; at 100 GFLOP/s, of two cores, ")
    assert "at least" in lines[2]
    (line,) = (
        line for line in list_studies([1], Pace(tmp_path)) if line.startswith("    18 runs (seed 1): 90,000,000 images")
    )
    assert "116,400 local steps, 0 syncs" in line


def test_the_list_uses_the_rate_of_finished_runs(tmp_path: Path) -> None:
    lenet5 = Config(model="lenet5", device="cpu")
    for name, seconds in (("one", 10.0), ("other", 40.0), ("third", 20.0)):  # 1 epoch of 50,000 images
        write_run(tmp_path / name, lenet5, "centralized", [0.1], seconds=seconds)
    write_run(tmp_path / "on-a-gpu", lenet5.changed({"device": "cuda:1"}), "centralized", [0.1], seconds=25.0)
    write_run(tmp_path / "short", lenet5, "centralized", [0.1], seconds=1.0)
    write_run(tmp_path / "unfinished", lenet5, "centralized", [0.1], finished=False, seconds=10.0)
    for name, text in (("damaged", "{"), ("foreign", "[]"), ("empty", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(text)
        (tmp_path / name / "config.json").write_text(text)
    assert measured_rates(tmp_path) == {("lenet5", "fp32", "cpu"): 2500, ("lenet5", "fp32", "cuda"): 2000}
    lines = list(list_studies([], Pace(tmp_path)))
    assert seconds_of("scaled-small", lines) == pytest.approx(
        24_000_000 / (2000 if torch.cuda.is_available() else 2500), abs=180
    )
    rate = "2,000 images/s (lenet5, fp32, cuda)" if torch.cuda.is_available() else "2,500 images/s (lenet5, fp32, cpu)"
    assert f"finished runs in {tmp_path}: {rate}" in lines[-1]


def test_runs_that_come_with_fedsim_count_where_the_own_have_none_of_their_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, kept = tmp_path / "own", tmp_path / "kept"
    monkeypatch.setattr("fedsim.experiments.cost.KEPT", kept)
    for folder, model, seconds in ((own, "lenet5", 10.0), (kept, "lenet5", 50.0), (kept, "lenet-bn", 100.0)):
        config = Config(model=model, device="cpu")
        write_run(folder / model, config, "centralized", [0.1], seconds=seconds)
    pace = Pace(own, kept)
    assert pace.time(Config(model="lenet5", device="cpu"), 50_000) == (10.0, False)
    assert pace.time(Config(model="lenet-bn", device="cpu"), 50_000) == (100.0, False)
    assert f"{own}: 5,000 images/s (lenet5, fp32, cpu); at the median rate of finished" in str(pace)
    assert f"in {kept}, perhaps of another machine: 500 images/s (lenet-bn, fp32, cpu)" in str(pace)


def test_the_pace_of_texts_is_that_of_windows_as_long(tmp_path: Path) -> None:
    text = Config(dataset="text", model="gpt-tiny", device="cpu")
    images = Config(model="lenet5", device="cpu")
    write_run(tmp_path / "text", text, "centralized", [0.1], seconds=20.0)
    write_run(tmp_path / "images", images, "centralized", [0.1], seconds=10.0)
    pace, windows = Pace(tmp_path), images_of_epoch(text, "centralized")
    assert pace.time(text, windows) == (20.0, False)
    assert str(pace).endswith(f"in {tmp_path}: {windows / 20:,.0f} windows/s (gpt-tiny on text, fp32, cpu)")
    longer = pace.time(text.changed({"dataset": "text:context=128"}), windows)
    assert str(longer).startswith("at least ")
    assert longer.seconds == windows * flop_per_image(text.changed({"dataset.context": 128})) / REFERENCE_FLOPS


def test_nothing_is_known_of_a_gpu_without_a_run_on_one(tmp_path: Path) -> None:
    pace = Pace(tmp_path)
    time = pace.time(Config(device="cuda"), 1) + pace.time(Config(device="cpu"), 1)
    assert (str(time), time.rounded) == ("unknown time", "unknown time")
    assert "at an unknown rate, as no run of its kind is finished: (lenet-bn, fp32, cuda)" in str(pace)


def test_of_one_round_the_whole_traffic_is_the_peak(small: Config, tmp_path: Path) -> None:
    cells = [Cell((), "localsgd", small.changed({"rounds": rounds, "device": "cpu"})) for rounds in (1, 2)]
    one, two, _ = plan_lines(cells, Pace(tmp_path))
    assert ("in a round at most" in one, "in a round at most" in two) == (False, True)


@pytest.mark.parametrize(
    "keys",
    [
        {"momentum-at-sync": "average", "model": SMALL_BATCHNORM, "dataset.images": 128},
        {"compress": "topk", "fraction": 0.5},
        {"compress": "powersgd", "precision": "fp64"},
        {"compress": "int4", "momentum-at-sync": "reset", "local-steps": 4},
        {"outer": "streaming:fragments=3,delay=2", "model": SMALL_BATCHNORM, "dataset.images": 128},
        {"momentum-at-sync": "average:momentum=2,second-moments=3", "optimizer": "adamw", "lr": 0.001},
        {"outer": "streaming", "compress": "int8", "compress-down": "topk", "epochs": 1.0},
    ],
)
def test_the_traffic_planned_is_the_traffic_recorded(run: Execute, small: Config, keys: dict[str, Any]) -> None:
    keys = {"epochs": 1.0, "evaluate-every": 9, **keys}
    row = rows_of(run(**keys))[-1]  # its bytes are those of the updates
    whole, peak = traffic(small.changed(keys))
    assert whole == (row["bytes_up"], row["bytes_down"])
    assert peak == (row["peak_bytes_up"], row["peak_bytes_down"])


def test_what_links_between_clients_would_carry(small: Config, tmp_path: Path) -> None:
    """Twice as much within the groups of two as between them."""
    groups = small.changed({"topology": "groups:size=2,every=2", "rounds": 4})
    message = 4 * 62_006
    assert links(groups) == Links(12, 2 * message, 4 * message, 3 * message)
    assert links(small.changed({"topology": "ring", "rounds": 4})) == Links(8, 4 * message, 4 * message, 2 * message)
    assert links(groups.changed({"rounds": 1, "fraction": 0.25})) == Links(0, 0, 0, 0)
    line, _ = plan_lines([Cell((), "localsgd", groups.changed({"device": "cpu"}))], Pace(tmp_path))
    words = (
        "without a server 12 links between clients of 0.5 to 1.0 MB each, and in a round at most 0.744 MB to one client"
    )
    assert words in line


def test_a_plan_says_what_is_left_to_run_and_writes_nothing(run: Execute, small: Config, tmp_path: Path) -> None:
    run(name="done", epochs=1.0)
    run(name="begun", epochs=2.0, stop_after_rounds=1)
    cells = [
        Cell((), "localsgd", small.changed({"name": name, "epochs": epochs, "device": "cpu"}))
        for name, epochs in (("done", 1.0), ("begun", 2.0), ("new", 4.0))
    ]
    before = sorted(tmp_path.rglob("*"))
    *lines, total = plan_lines(cells, Pace(tmp_path))
    assert [line.split(":")[0] for line in lines] == ["done   finished", "begun  begun", "new    new"]
    megabytes = 16 * 4 * 62_006 * 4 / 1e6  # rounds, clients, parameters, bytes
    words = f"16 rounds, 32 local steps, 512 images, {megabytes:,.1f} MB up, {megabytes:,.1f} MB down, "
    assert words in lines[2]
    first, *_, last = read_rows(tmp_path / "done")
    rate = (last["epoch"] - first["epoch"]) * 128 / (last["seconds"] - first["seconds"])  # without the start
    assert f"those not finished take {6 * 128 / rate:.1f} s (one run after the other; at the median rate" in total
    with pytest.raises(UserError, match="holds a run of another configuration"):
        list(plan_lines([cells[0]._replace(config=cells[0].config.changed({"lr": 0.5}))], Pace(tmp_path)))
    assert sorted(tmp_path.rglob("*")) == before
