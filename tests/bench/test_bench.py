"""The bench measures what it says; how fast that is, is no matter of tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fedsim.bench.baseline_torch import PilImages
from fedsim.bench.measure import bench, contest, flop_per_image, large_table, seconds_of_tables, table, write_figures
from fedsim.bench.variants import ON_CPU, Figure
from fedsim.config import Config
from fedsim.data.datasets import load_dataset
from fedsim.device import resolve

TINY = Config(
    dataset="synthetic", synthetic_images=256, model="lenet5", batch_size=8, local_steps=2, device="cpu", threads=1
)


def test_every_contestant_takes_its_turns_and_is_set_beside_the_limit(tmp_path: Path) -> None:
    names = ["limit", "limit-eager", "fleet", "fused", "fused-products", "fused-streams", "loop", "plain"]
    figures, failed = bench(resolve(TINY, "localsgd"), [2], names, rounds=2, passes=1)
    assert failed == []
    assert [figure.contestant for figure in figures] == names
    assert all(len(figure.seconds) == 2 and min(figure.seconds) > 0 for figure in figures)
    assert all(figure.peak_bytes > 2**20 for figure in figures)
    write_figures(tmp_path / "bench.json", figures, "cpu", flop_per_image=1.0)
    content = json.loads((tmp_path / "bench.json").read_text())
    assert {"commit", "device", "versions", "command", "flop_per_image"} <= content.keys()
    assert [figure["contestant"] for figure in content["figures"]] == names


def test_flower_alone_takes_its_turns() -> None:
    (figure,), _ = bench(resolve(TINY, "localsgd"), [2], ["flower-plain"], rounds=2, passes=1)
    assert len(figure.seconds) == 2
    assert min(figure.seconds) > 0


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_takes_its_turns() -> None:
    (figure,), _ = bench(resolve(TINY, "localsgd"), [2], ["limit-compiled"], rounds=2, passes=1)
    assert min(figure.seconds) > 0


def test_a_contestant_that_fails_is_named_and_the_others_have_their_turns() -> None:
    config = resolve(TINY.changed({"synthetic-images": 10}), "localsgd")  # shards of 5, batches of 8: no run
    figures, failed = bench(config, [2], ["flower", "limit"], rounds=1, passes=1)
    assert [figure.contestant for figure in figures] == ["limit"]
    assert [text.split(" at ")[0] for text in failed] == ["flower"]


def test_rates_are_images_over_the_median_second() -> None:
    config = TINY.changed({"clients": 3})
    figures = [Figure("limit", config, [1.0, 9.0, 2.0], 1), Figure("fleet", config, [4.0], 1)]
    assert figures[0].images_per_second == 3 * 2 * 8 / 2
    console = Console(width=200, record=True, quiet=False)
    console.print(table(figures, flop=1e9))
    assert "0.50" in console.export_text()


def test_on_the_cpu_every_way_gets_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.bench.measure.cpu_count", lambda: 6)
    threads = {name: contest(TINY, 4, name).threads for name in ON_CPU}
    alone = {"fleet", "flower", "flower-plain"}
    assert threads == {name: 1 if name in alone else 6 for name in ON_CPU}


def test_both_tables_are_estimated_from_rates_at_all_their_sizes() -> None:
    def figure(name: str, images: int, **keys: int) -> Figure:  # at `images` a second
        config = Config().changed({"local-steps": 1, **{key.replace("_", "-"): value for key, value in keys.items()}})
        return Figure(name, config, [config.clients * config.batch_size / images], 1)

    large = [figure("limit", 500_000, clients=1, batch_size=256 * 2**power) for power in range(6)]
    fleets = [figure("fleet", 1_000, clients=k) for k in (4, 12)]
    fused = [figure("fused-groups", 200_000, clients=k) for k in (4, 12)]
    # 18 cells of 100 epochs; 200 rounds of 10, 20 and 30 steps of 4 and 12 clients; 100 and 40 tests a cell
    expected = 18 * 100 * 50_000 / 500_000 + 200 * 60 * 16 * 64 / 200_000 + (1800 + 240) * 10_000 / 1e6
    assert seconds_of_tables([*fleets, *fused], large, testing=1e6) == pytest.approx(expected)
    assert seconds_of_tables(fused, large[1:], testing=1e6) is None
    assert seconds_of_tables(fused[:1], large, testing=1e6) is None
    console = Console(width=200, record=True, quiet=False)
    console.print(large_table(large, flop=1e9, matrix=1e15))
    assert "0.500" in console.export_text()


def test_flop_of_lenet5_by_hand() -> None:
    """Two FLOP a multiply-add; backward costs twice the forward, but for the first layer's input gradient."""
    forward = [28 * 28 * 6 * 75, 10 * 10 * 16 * 150, 400 * 120, 120 * 84, 84 * 10]
    assert flop_per_image(TINY) == 2 * (3 * sum(forward) - forward[0])


def test_the_plain_loop_sees_the_same_images() -> None:
    data = load_dataset(TINY).train
    plain = PilImages(data.pixels(), data.labels)
    assert len(plain) == 256
    image, label = plain[7]
    assert (image.shape, label) == (torch.Size([3, 32, 32]), int(data.labels[7]))
