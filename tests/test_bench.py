"""The bench measures what it says; how fast that is, is no matter of tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fedsim.bench import Figure, bench, contest, flop_per_image, table, write_figures
from fedsim.bench_plain import PilImages
from fedsim.config import Config
from fedsim.data import load_dataset
from fedsim.machine import resolve

TINY = Config(
    dataset="synthetic", synthetic_images=256, model="lenet5", batch_size=8, local_steps=2, device="cpu", threads=1
)


def test_every_contestant_takes_its_turns_and_is_set_beside_the_limit(tmp_path: Path) -> None:
    names = ["limit", "fleet", "fused", "loop", "plain"]
    figures = bench(resolve(TINY, "localsgd"), [2], names, rounds=2, passes=1)
    assert [figure.contestant for figure in figures] == names
    assert all(len(figure.seconds) == 2 and min(figure.seconds) > 0 for figure in figures)
    assert all(figure.peak_bytes > 2**20 for figure in figures)
    write_figures(tmp_path / "bench.json", figures, "cpu", flop_per_image=1.0)
    content = json.loads((tmp_path / "bench.json").read_text())
    assert {"commit", "device", "versions", "command", "flop_per_image"} <= content.keys()
    assert [figure["contestant"] for figure in content["figures"]] == names


def test_rates_are_images_over_the_median_second() -> None:
    config = TINY.changed({"clients": 3})
    figures = [Figure("limit", config, [1.0, 9.0, 2.0], 1), Figure("fleet", config, [4.0], 1)]
    assert figures[0].images_per_second == 3 * 2 * 8 / 2
    console = Console(width=200, record=True, quiet=False)
    console.print(table(figures, flop=1e9))
    assert "0.50" in console.export_text()


def test_on_the_cpu_every_way_gets_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.bench.cpu_count", lambda: 6)
    threads = {name: contest(TINY, 4, name).threads for name in ("limit", "fleet", "fused", "loop", "flower", "plain")}
    assert threads == {"limit": 6, "fleet": 1, "fused": 6, "loop": 6, "flower": 1, "plain": 6}


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
