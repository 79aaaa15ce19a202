"""The network traffic of a run, and its time on a given network.

- LocalSGD sends what its rows record: a sync is a message up and a message down for each worker of the round.
- The large-batch baseline of K workers counts as data-parallel SGD on K workers, each with a K-th of the batch: a
  sync at every step sends the gradient up and the mean gradient down, 4 bytes per parameter, direction and worker.
- One worker (K = 1), and a centralized run that is not a baseline, is one machine: it has no syncs and sends no bytes.

With K workers per round and one server:

    seconds = local_steps * compute + syncs * 2 * latency + bytes_on_the_link / bandwidth

- `local_steps` are those of one worker, of `compute` seconds each: workers compute in parallel;
- each of the two messages of a sync has a one-way `latency`;
- `link` = worker: each worker has its own link, bytes_on_the_link = bytes / K; server: all share the link of the
  server, bytes_on_the_link = bytes. Upload, download and local steps do not overlap.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

import pandas as pd

from fedsim.errors import UserError

Link = Literal["worker", "server"]
BYTES_PER_PARAMETER = 4  # float32
BITS = {"bit": 1, "kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9, "B": 8, "kB": 8e3, "MB": 8e6, "GB": 8e9}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


class Network(NamedTuple):
    """Bandwidth in bytes per second, one-way latency in seconds, and the link that limits the traffic."""

    bandwidth: float
    latency: float
    link: Link = "worker"


def add_traffic(records: pd.DataFrame) -> pd.DataFrame:
    """`records` (runs or rows) with `network_syncs` and `network_bytes`, of all workers in both directions.

    They are NaN where the recorded traffic, or the number of parameters of a baseline, is unknown. Requires the columns
    `clients`, `workers` and `baseline` of the cell, `parameters`, and the costs of a row.
    """
    syncs = records["syncs"].where(~records["baseline"], records["local_steps"])
    gradient = BYTES_PER_PARAMETER * records["parameters"] * records["workers"]
    recorded = records["bytes_up"] + records["bytes_down"]
    sent = recorded.where(~records["baseline"], 2 * gradient * records["local_steps"])
    alone = records["clients"] == 1
    return records.assign(network_syncs=syncs.mask(alone, 0.0), network_bytes=sent.mask(alone, 0.0))


def network_seconds(records: pd.DataFrame, compute: pd.Series, network: Network) -> pd.Series:
    """The formula of this module for each of `records`; `compute` in seconds per local step."""
    on_the_link = records["network_bytes"] / (records["workers"] if network.link == "worker" else 1)
    messages = records["network_syncs"] * 2 * network.latency
    return records["local_steps"] * compute + messages + on_the_link / network.bandwidth


def rate(text: str) -> float:
    """Bytes per second of, for instance, 100Mbit, 100Mbit/s or 12.5MB; the prefixes are decimal."""
    return _quantity("bandwidth", text.removesuffix("/s"), BITS, "100Mbit") / 8


def duration(name: str, text: str, zero: bool = False) -> float:
    """Seconds of, for instance, 20ms."""
    return _quantity(name, text, SECONDS, "20ms", zero)


def _quantity(name: str, text: str, units: dict[str, float], example: str, zero: bool = False) -> float:
    found = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*([A-Za-z]+)", text.strip())
    value = float(found[1]) if found else 0.0
    if not found or found[2] not in units or (value == 0 and not zero) or value > 1e15:
        needs = "a number" if zero else "a number above 0"
        raise UserError(f"{name} = {text!r} is not {needs} with one of {', '.join(units)}: for instance {example}")
    return value * units[found[2]]
