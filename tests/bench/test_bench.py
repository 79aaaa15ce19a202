"""The bench measures what it claims; speed itself is not tested."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console, RenderableType

from fedsim import cli
from fedsim.bench.baseline_torch import PilImages, plain_rounds
from fedsim.bench.measure import at, measure, run_bench, write_timings
from fedsim.bench.tables import large_table, rounds_table
from fedsim.bench.turn import Timing, run_measured
from fedsim.bench.turn import main as run_task
from fedsim.bench.variants import METHODS, ON_CPU, VARIANTS
from fedsim.config import Config
from fedsim.config.options import BenchOptions
from fedsim.data.image_sets import load_images
from fedsim.device import resolve
from fedsim.experiments.cost import flop_per_image
from tests.federation.test_flwr_run import started_by
from tests.pages import read_page

LIMIT = 300.0  # seconds, for what takes a few
TINY = Config(dataset="synthetic:images=256", model="lenet5", batch_size=8, local_steps=2, device="cpu", threads=1)


def turns(config: Config, *names: str) -> list[tuple[str, Config]]:
    return [(name, at(config, 2, name)) for name in names]


def allocated(mib: int) -> bytearray:
    """So much resident memory."""
    held = bytearray(mib << 20)
    held[::1024] = bytes([1]) * len(held[::1024])
    return held


@pytest.mark.parametrize(
    "variant",
    [
        name
        for name in VARIANTS
        if name not in ("centralized-compiled", "flower", "flower-plain")
        and (name in ON_CPU or name == "stacked-products" or name == "scaffold-inferred")
    ],
)
def test_every_variant_times_its_rounds(variant: str, tmp_path: Path) -> None:
    config = at(resolve(TINY, "localsgd"), 2, variant).changed({"threads": 1})
    run_task({"variant": variant, "keys": config.as_keys(), "rounds": 2, "result": str(tmp_path / "turn.json")})
    seconds = json.loads((tmp_path / "turn.json").read_text())["seconds"]
    assert len(seconds) == 2
    assert min(seconds) > 0


def test_a_variant_that_fails_is_named_and_has_no_other_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing: list[Sequence[str]] = []

    def measured(command: Sequence[str], *arguments: Any) -> int:
        """The turn that fails takes place in this process, which has imported torch."""
        if "own_code:fails" not in command[-1]:
            return run_measured(command, *arguments)
        failing.append(command)
        run_task(json.loads(command[-1]))
        return 1

    monkeypatch.setattr("fedsim.bench.turn.run_measured", measured)
    config = resolve(TINY, "localsgd")
    fails = turns(config.changed({"model": "tests.own_code:fails"}), "in-process")
    timings, failed = measure([*fails, *turns(config, "centralized"), *fails], rounds=1, limit=LIMIT)
    assert [(timing.variant, len(timing.seconds)) for timing in timings] == [("centralized", 1)]
    assert len(failing) == 1
    assert min(timings[0].seconds) > 0
    assert 2**26 < timings[0].peak_bytes < 2**31
    (line,) = failed
    assert line.startswith("K = 2, J = 2: in-process: UserError: model = tests.own_code:fails ")
    assert "UserError: model = tests.own_code:fails " in capsys.readouterr().err
    write_timings(tmp_path / "bench.json", timings, "cpu", flop_per_image=1.0)
    content = json.loads((tmp_path / "bench.json").read_text())
    assert {"commit", "device", "versions", "command", "flop_per_image"} <= content.keys()
    assert [timing["variant"] for timing in content["timings"]] == ["centralized"]


@pytest.mark.slow
def test_flower_alone_is_measured_where_a_cluster_has_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would wait for the cluster whose address it finds in its temporary folder, or in RAY_ADDRESS."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
        monkeypatch.setenv("RAY_ADDRESS", address)
        (timing,), failed = measure(turns(resolve(TINY, "localsgd"), "flower-plain"), rounds=2, limit=LIMIT)
    assert failed == []
    assert len(timing.seconds) == 2
    assert min(timing.seconds) > 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_takes_its_turns() -> None:
    (timing,), _ = measure(turns(resolve(TINY, "localsgd"), "centralized-compiled"), rounds=2, limit=LIMIT)
    assert min(timing.seconds) > 0


def test_a_variant_that_passes_the_time_limit_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("STARTED_BY", str(tmp_path))
    endless = resolve(TINY.changed({"local-steps": 10**6}), "localsgd")
    timings, failed = measure(turns(endless, "in-process"), rounds=1, limit=1)
    assert timings == []
    (line,) = failed
    assert line.split(": ")[1:3] == ["in-process", "not done within the time limit of 1 s"]
    assert started_by(str(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


ALLOCATES = """
import subprocess, sys, time
held = bytearray(int(sys.argv[1]) << 20)
held[::1024] = bytes([1]) * len(held[::1024])
children = [subprocess.Popen([sys.executable, "-c", sys.argv[2], mib, ""]) for mib in sys.argv[3:]]
time.sleep(1.5)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_is_that_of_the_processes_and_not_of_their_parent(tmp_path: Path) -> None:
    held = allocated(200)  # of this process, which is the parent
    of_children = ["60", "40"]
    command = [sys.executable, "-c", ALLOCATES, "80", ALLOCATES, *of_children]
    with (tmp_path / "log").open("wb") as log:
        peak = run_measured(command, os.environ, log, LIMIT)
    expected = 80 + sum(map(int, of_children))
    assert expected << 20 <= peak <= (expected + 30 * (1 + len(of_children))) << 20  # and an interpreter for each
    del held


def test_rates_are_images_over_the_median_second() -> None:
    config = TINY.changed({"clients": 3})
    timings = [Timing("centralized", config, [1.0, 9.0, 2.0], 1), Timing("in-process", config, [4.0], 1)]
    assert timings[0].images_per_second == 3 * 2 * 8 / 2
    assert timings[0].joined(Timing("centralized", config, [3.0], 7)) == Timing(
        "centralized", config, [1.0, 9.0, 2.0, 3.0], 7
    )
    (line,) = (line.split() for line in printed(rounds_table(timings)).splitlines() if line.startswith("3 in-process"))
    assert line[2:] == ["4.000", "0%", "12", "0.50", "1.00", "0"]
    one = config.changed({"clients": 1})
    fast = Timing("centralized", one, [2 * 8 * flop_per_image(one) / 2.5e12], 1)
    (line,) = (line.split() for line in printed(large_table([fast])).splitlines() if "fp32" in line)
    assert (line[1], line[-1]) == ("8", "2.50")  # TFLOP/s


def printed(*tables: RenderableType) -> str:
    """What `run.py bench` prints to a pipe: 80 columns."""
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(*tables)
    return console.export_text()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_row_of_the_table_is_a_line_of_80_columns_and_columns_without_values_are_left_out(device: str) -> None:
    timings = [
        Timing(name, at(TINY.changed({"device": device}), k, name), [123.456, 300.0], 2**36)
        for k in (1, 64)
        for name in VARIANTS
    ]
    text = printed(rounds_table(timings))
    lines = [line.split() for line in text.splitlines()]
    for each in timings:
        (row,) = (line for line in lines if line[:2] == [str(each.config.clients), each.variant])
        assert len(row) == 8
        assert row[-1] == "65,536"
    assert "…" not in text
    methods = printed(rounds_table([each for each in timings if each.variant in METHODS]))
    assert not re.search("tralized|of in-|of centralized", methods)
    assert "scaffold-inferred: in-process with local-rule = scaffold-inferred" in methods


def test_measurements_are_written_before_their_table_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise ZeroDivisionError("in the table")

    monkeypatch.setattr("fedsim.bench.measure.take_turn", lambda name, config, *_: Timing(name, config, [2.0], 1))
    monkeypatch.setattr("fedsim.bench.measure.rounds_table", fails)
    output = tmp_path / "bench.json"
    options = BenchOptions(
        clients=(2,), variants=("centralized",), timed=1, passes=3, time_limit=LIMIT, grow=False, out=str(output)
    )
    with pytest.raises(ZeroDivisionError, match="in the table"):
        run_bench(TINY.as_keys(), options, Console(file=io.StringIO()))
    (timing,) = json.loads(output.read_text())["timings"]
    assert timing["seconds"] == [2.0] * 3  # of its turns, joined


def test_the_turn_that_the_first_hour_profiles_is_one(tmp_path: Path) -> None:
    (written,) = re.findall(r"fedsim\.bench\.turn '(.*?)'", read_page("gpu-first-hour.md"), re.DOTALL)
    task = json.loads(written)
    small = {"device": "cpu", "model": "lenet5", "dataset.images": 256, "batch-size": 2, "local-steps": 1}
    run_task({**task, "rounds": 1, "result": str(tmp_path / "turn.json"), "keys": {**task["keys"], **small}})
    (second,) = json.loads((tmp_path / "turn.json").read_text())["seconds"]
    assert second > 0


def test_on_the_cpu_every_variant_uses_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.bench.measure.cpu_count", lambda: 6)
    threads = {name: at(TINY, 4, name).threads for name in ON_CPU}
    threaded = {"in-process", "stacked", "flower", "flower-plain"}
    assert threads == {name: 1 if name in threaded else 6 for name in ON_CPU}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--clients 0", "clients = 0 is out of range"),
        ("--clients=-3", "clients = -3 is out of range"),
        ("--clients=", "clients = '' is not a list of whole numbers"),
        ("--clients 4,,2", "clients = '4,,2' is not a list of whole numbers"),
        ("--clients 60000", "clients = 60000 is more than the 50000 training images"),
        ("--clients 1000", "batch-size = 64 is more than a shard of 50 images"),
        ("--variants limit", "variants = 'limit' is unknown: it must be one of centralized, "),
        ("--variants ,", "variants = '' is unknown"),
        ("--timed 0", "timed = 0 is out of range: it must be at least 1"),
        ("--time-limit 0", "time-limit = 0 is out of range: it must be at least 1"),
        ("-o {folder}", "out = {folder} cannot be written (Is a directory): give another -o"),
        ("-o {folder}/file/bench.json", "out = {folder}/file/bench.json cannot be written (File exists)"),
        ("-o /proc/bench.json", "out = /proc/bench.json cannot be written"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_measured(
    arguments: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", "bench", *arguments.format(folder=tmp_path).split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1), err
    assert words.format(folder=tmp_path) in err
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "results"}


def test_the_plain_loop_sees_the_same_images() -> None:
    data = load_images(TINY).train
    plain = PilImages(data.pixels(), data.labels)
    assert len(plain) == 256
    image, label = plain[7]
    assert (image.shape, label) == (torch.Size([3, 32, 32]), int(data.labels[7]))


def test_the_plain_loop_has_the_normalization_of_the_others() -> None:
    config = TINY.changed(
        {"model": "tests.own_code:not_with_batchnorm", "optimizer": "sgdm:nesterov=true", "clients": 2}
    )
    assert len(plain_rounds(config, rounds=1)) == 1
