from __future__ import annotations

from pathlib import Path

import pytest

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.report.load import CellResults, Result
from fedsim.report.network import Network, Traffic, duration, rate, seconds_of, traffic


def test_the_time_of_a_run_by_hand() -> None:
    # 100 steps of 10 ms, 20 syncs of 2 * 25 ms, 4 workers with 3 MB up and 1 MB down together
    sent = Traffic(20, 3e6, 1e6)
    alone = Network(bandwidth=1e6, latency=0.025)
    assert seconds_of(100, sent, 4, 0.010, alone) == pytest.approx(1 + 1 + 1)
    assert seconds_of(100, sent, 4, 0.010, alone._replace(link="server")) == pytest.approx(1 + 1 + 4)
    assert seconds_of(100, Traffic(0, 0, 0), 1, 0.010, alone) == pytest.approx(1)


def test_the_traffic_of_localsgd_is_recorded_and_of_its_twin_a_gradient_a_step(tmp_path: Path) -> None:
    row = {"local_steps": 50, "syncs": 5, "bytes_up": 700, "bytes_down": 600}
    local = Result(tmp_path, {"mode": "localsgd"}, [row], None)
    assert traffic(cell(local, workers=4), local, row) == (5, 700, 600)
    central = Result(tmp_path, {"mode": "centralized"}, [row], {"parameters": 1000})
    assert traffic(cell(central, workers=4), central, row) == (50, 50 * 4 * 4000, 50 * 4 * 4000)
    assert traffic(cell(central, workers=1), central, row) == (0, 0, 0)
    begun = Result(tmp_path, {"mode": "centralized"}, [row], None)
    assert traffic(cell(begun, workers=4), begun, row) is None


def cell(run: Result, workers: int) -> CellResults:
    return CellResults((), Config().as_keys(), workers, [run], 1)


@pytest.mark.parametrize(
    ("text", "bytes_a_second"),
    [("100Mbit", 12.5e6), ("100 Mbit/s", 12.5e6), ("1Gbit", 125e6), ("8kbit", 1000), ("16bit", 2), ("12.5MB", 12.5e6),
     ("2B", 2), ("3kB", 3000), (".5GB/s", 5e8)],
)  # fmt: skip
def test_bandwidths(text: str, bytes_a_second: float) -> None:
    assert rate(text) == pytest.approx(bytes_a_second)


@pytest.mark.parametrize(("text", "seconds"), [("20ms", 0.02), ("5us", 5e-6), ("1.5 s", 1.5)])
def test_durations(text: str, seconds: float) -> None:
    assert duration("latency", text) == pytest.approx(seconds)
    assert duration("latency", "0ms", zero=True) == 0


@pytest.mark.parametrize(
    "text", ["", "100", "Mbit", "-1Mbit", "0Mbit", "1Mb", "1mbit", "1e3Mbit", "nanMbit", "1Mbit/h"]
)
def test_a_bandwidth_without_a_number_and_a_unit_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="for instance 100Mbit"):
        rate(text)


@pytest.mark.parametrize("text", ["", "20", "ms", "-1ms", "0ms", "1m"])
def test_a_duration_without_a_number_and_a_unit_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"latency = .* for instance 20ms"):
        duration("latency", text)
