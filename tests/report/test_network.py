from __future__ import annotations

import pandas as pd
import pytest

from fedsim.errors import UserError
from fedsim.report.network import Network, add_traffic, duration, network_seconds, rate


def test_the_time_of_a_run_by_hand() -> None:
    # 100 steps of 10 ms, 20 syncs of 2 * 25 ms, 4 workers with 4 MB up and down together
    run = pd.DataFrame({"local_steps": [100], "network_syncs": [20], "network_bytes": [4e6], "workers": [4]})
    compute, own_links = pd.Series([0.010]), Network(bandwidth=1e6, latency=0.025)
    assert list(network_seconds(run, compute, own_links)) == pytest.approx([1 + 1 + 1])
    assert list(network_seconds(run, compute, own_links._replace(link="server"))) == pytest.approx([1 + 1 + 4])


@pytest.mark.parametrize(
    ("clients", "workers", "baseline", "syncs", "sent"),
    [
        (4, 4, False, 5, 1300),  # LocalSGD, as recorded
        (4, 1, False, 5, 1300),  # a round samples one of four: the model still moves between machines
        (4, 4, True, 50, 50 * 4 * 2 * 4000),  # a gradient up and the mean down at every step
        (1, 1, True, 0, 0),  # one worker has nobody to talk to
        (1, 1, False, 0, 0),
    ],
)
def test_traffic(clients: int, workers: int, baseline: bool, syncs: int, sent: int) -> None:
    row = {"local_steps": 50, "syncs": 5, "bytes_up": 700, "bytes_down": 600, "parameters": 1000}
    records = pd.DataFrame([{**row, "clients": clients, "workers": workers, "baseline": baseline}])
    found = add_traffic(records).iloc[0]
    assert (found["network_syncs"], found["network_bytes"]) == (syncs, sent)


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
    "text",
    ["", "100", "Mbit", "-1Mbit", "0Mbit", "1Mb", "1mbit", "1e3Mbit", "nanMbit", "1Mbit/h", "٣Mbit", "9" * 400 + "bit"],
)
def test_a_bandwidth_without_a_number_and_a_unit_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="for instance 100Mbit"):
        rate(text)


@pytest.mark.parametrize("text", ["", "20", "ms", "-1ms", "0ms", "1m"])
def test_a_duration_without_a_number_and_a_unit_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"latency = .* for instance 20ms"):
        duration("latency", text)
