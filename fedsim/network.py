"""The seconds that a sync of LocalSGD takes on a given network.

With K workers per round, a sync of messages of m bytes per worker takes, by the `link` that limits it:

- worker: a server, to which each worker has a link of its own. Up, then down: 2 latency + m_up / upload + m_down /
  bandwidth.
- server: all workers share the link of the server: 2 latency + K m_up / upload + K m_down / bandwidth.
- all-reduce: no server. In a ring, each worker sends and receives at the same time 2 (K - 1) / K m bytes in 2 (K - 1)
  steps (Patarasuk and Yuan 2009). Updates that cannot be summed on their way (every codec except fp16 and bf16, every
  mean except the exact one, every strategy except LocalSGD) are gathered instead: (K - 1) m bytes in K - 1 steps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fedsim.config.options import Link
from fedsim.errors import UserError
from fedsim.registry import is_own
from strategies.arguments import split_name

SUMMED_ON_THE_WAY = {"compress": ("none", "fp16", "bf16"), "mean": ("exact",)}  # by their names
BITS = {"bit": 1, "kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9, "B": 8, "kB": 8e3, "MB": 8e6, "GB": 8e9}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


class Network(NamedTuple):
    """A network: the bandwidth of a link down in bytes per second, the latency one way in seconds, the link that limits
    the traffic, and the bandwidth up (0: as down).
    """

    bandwidth: float
    latency: float
    link: Link = "worker"
    upload: float = 0.0


def is_summed(config: Mapping[str, Any]) -> bool:
    """Whether the updates of a run can be summed on their way; those of an outer step of one's own are not known to."""
    named = all(split_name(str(config.get(key, names[0])))[0] in names for key, names in SUMMED_ON_THE_WAY.items())
    return named and not is_own(str(config.get("outer", "none")))


class Sync(NamedTuple):
    """What syncs take: seconds of latency, seconds that are inversely proportional to the bandwidth, and the bytes that
    all workers send; numbers, or columns of a table.
    """

    waiting: Any
    transfer: Any
    sent_up: Any
    sent_down: Any


def sync(network: Network, up: Any, down: Any, workers: Any, summed: Any, syncs: Any = 1) -> Sync:
    """What so many syncs take, in which all `workers` together send messages of `up` bytes, and receive `down`.

    `summed`: whether updates can be summed on their way.
    """
    messages = 2  # after each other in a sync
    if network.link == "all-reduce":
        others = workers - 1
        up = down = up * others * np.where(summed, 2 / workers, 1)
        messages = others * np.where(summed, 2, 1)
    links = 1 if network.link == "server" else workers
    seconds_up, seconds_down = up / links / (network.upload or network.bandwidth), down / links / network.bandwidth
    both_at_once = network.link == "all-reduce"
    transfer = np.maximum(seconds_up, seconds_down) if both_at_once else seconds_up + seconds_down
    return Sync(syncs * messages * network.latency, transfer, up, down)


def rate(name: str, text: str) -> float:
    """Bytes per second of, for instance, 100Mbit, 100Mbit/s or 12.5MB; the prefixes are decimal."""
    return _quantity(name, text.removesuffix("/s"), BITS, "100Mbit") / 8


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
