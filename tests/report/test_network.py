from __future__ import annotations

from typing import get_args

import pandas as pd
import pytest

from fedsim.config.options import Link
from fedsim.errors import UserError
from fedsim.network import Network, duration, rate
from fedsim.report.network import add_traffic, network_seconds

# 20 syncs, 4 workers with 3 MB up and 1 MB down together
TRAFFIC = {"network_syncs": 20, "network_up": 3e6, "network_down": 1e6, "workers": 4}


@pytest.mark.parametrize(
    ("network", "summed", "waiting", "transfer"),
    [
        (Network(1e6, 0.025), True, 20 * 0.05, 0.75 + 0.25),
        (Network(1e6, 0.025, upload=1e5), True, 20 * 0.05, 7.5 + 0.25),
        (Network(1e6, 0.025, "server"), True, 20 * 0.05, 3 + 1),
        # A ring of four: 2 * 3 messages of a quarter of the 0.75 MB of a worker's updates, up and down at once
        (Network(1e6, 0.025, "all-reduce"), True, 20 * 6 * 0.025, 6 * 0.75 / 4),
        (Network(1e6, 0.025, "all-reduce", upload=1e5), True, 20 * 6 * 0.025, 10 * 6 * 0.75 / 4),
        # Gathered: the whole of the three others'
        (Network(1e6, 0.025, "all-reduce"), False, 20 * 3 * 0.025, 3 * 0.75),
    ],
)
def test_the_time_of_messages_by_hand(network: Network, summed: bool, waiting: float, transfer: float) -> None:
    found = network_seconds(pd.DataFrame([{**TRAFFIC, "summed": summed}]), network).iloc[0]
    assert (found["waiting"], found["transfer"]) == pytest.approx((waiting, transfer))


def test_one_worker_waits_for_nobody() -> None:
    alone = {**TRAFFIC, "workers": 1, "network_syncs": 0, "network_up": 0, "network_down": 0}
    for link in get_args(Link):
        found = network_seconds(pd.DataFrame([{**alone, "summed": True}]), Network(1e6, 1.0, link))
        assert found.to_numpy().tolist() == [[0, 0, 0, 0]]


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
    row: dict[str, float] = {"steps_done": 50, "syncs": 5, "bytes_up": 700, "bytes_down": 600, "parameters": 1000}
    row |= {"overhead_bytes_up": 100, "overhead_bytes_down": float("nan")}  # of older records: not recorded
    row |= {"peak_bytes_up": 150, "peak_bytes_down": 120}
    records = pd.DataFrame([{**row, "clients": clients, "workers": workers, "baseline": baseline}])
    found = add_traffic(records).iloc[0]
    assert (found["network_syncs"], found["network_bytes"]) == (syncs, sent)
    assert found["network_up"] + found["network_down"] == sent
    assert found["network_peak"] == (0 if clients == 1 else 4 * 4000 if baseline else 150)
    assert found["overhead_bytes"] == (100 if sent == 1300 else 0)


@pytest.mark.parametrize(
    ("text", "bytes_a_second"),
    [("100Mbit", 12.5e6), ("100 Mbit/s", 12.5e6), ("1Gbit", 125e6), ("8kbit", 1000), ("16bit", 2), ("12.5MB", 12.5e6),
     ("2B", 2), ("3kB", 3000), (".5GB/s", 5e8)],
)  # fmt: skip
def test_bandwidths(text: str, bytes_a_second: float) -> None:
    assert rate("bandwidth", text) == pytest.approx(bytes_a_second)


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
        rate("bandwidth", text)


@pytest.mark.parametrize("text", ["", "20", "ms", "-1ms", "0ms", "1m"])
def test_a_duration_without_a_number_and_a_unit_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"latency = .* for instance 20ms"):
        duration("latency", text)
