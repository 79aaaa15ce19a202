"""What a run would take on a network: its traffic, and the time of it.

The model of time, for K workers and one server, every round the same:

    seconds = local_steps * compute + syncs * 2 * latency + bytes_on_the_link / bandwidth

- `local_steps`, of one worker: the workers compute at the same time, each step in `compute` seconds;
- a sync is a message up and a message down, each `latency` seconds under way (one way);
- `link` = worker: each worker has a link of its own, so that bytes_on_the_link = (bytes_up + bytes_down) / K;
  `link` = server: all messages share the server's link: bytes_on_the_link = bytes_up + bytes_down;
- up and down come one after the other; computing and sending do not overlap; nothing is compressed.

LocalSGD's syncs and bytes are those recorded. Centralized SGD at batch K * B stands for data-parallel SGD on K
workers with B images each: a sync at every step, which sends the gradient up and the mean gradient down, 4 bytes
a parameter each way and worker. On one worker it sends nothing; LocalSGD with K = 1 still talks to its server.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from fedsim.errors import UserError
from fedsim.records import Row
from fedsim.report.load import CellResults, Result

Link = Literal["worker", "server"]
BYTES_A_PARAMETER = 4  # float32
BITS = {"bit": 1, "kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9, "B": 8, "kB": 8e3, "MB": 8e6, "GB": 8e9}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


class Traffic(NamedTuple):
    """Syncs so far and the bytes that all workers together have sent and received."""

    syncs: int
    bytes_up: float
    bytes_down: float


class Network(NamedTuple):
    """Bytes a second, seconds one way, and whose link the bytes go over."""

    bandwidth: float
    latency: float
    link: Link = "worker"


def traffic(cell: CellResults, result: Result, row: Row) -> Traffic | None:
    """What had been sent at `row`; None where it is not known yet (a twin's parameters stand in its summary)."""
    if result.config["mode"] == "localsgd":
        return Traffic(row["syncs"], row["bytes_up"], row["bytes_down"])
    if cell.workers == 1:
        return Traffic(0, 0, 0)
    if result.summary is None:
        return None
    way = row["local_steps"] * cell.workers * result.summary["parameters"] * BYTES_A_PARAMETER
    return Traffic(row["local_steps"], way, way)


def seconds_of(local_steps: int, sent: Traffic, workers: int, compute: float, network: Network) -> float:
    """The module's formula."""
    sharing = workers if network.link == "worker" else 1
    on_the_link = (sent.bytes_up + sent.bytes_down) / sharing
    return local_steps * compute + sent.syncs * 2 * network.latency + on_the_link / network.bandwidth


def rate(text: str) -> float:
    """Bytes a second of, for instance, 100Mbit, 100Mbit/s or 12.5MB; the prefixes are decimal."""
    return _quantity("bandwidth", text.removesuffix("/s"), BITS, "100Mbit") / 8


def duration(name: str, text: str, zero: bool = False) -> float:
    """Seconds of, for instance, 20ms."""
    return _quantity(name, text, SECONDS, "20ms", zero)


def _quantity(name: str, text: str, units: dict[str, float], example: str, zero: bool = False) -> float:
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([A-Za-z]+)", text.strip())
    if not found or found[2] not in units or (float(found[1]) == 0 and not zero):
        needs = "a number" if zero else "a number above 0"
        raise UserError(f"{name} = {text!r} is not {needs} with one of {', '.join(units)}: for instance {example}")
    return float(found[1]) * units[found[2]]
