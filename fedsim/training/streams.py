"""The rounds of K workers at once on a GPU, each on a replica, a CUDA graph and a stream of its own.

Elsewhere the replicas take turns. All are `local_round.take_round`, up to the rounding of the kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch

from fedsim.config import Config
from fedsim.training.local_round import Replica, RoundEnd, RoundStart, build_replica, take_round


def take_rounds(config: Config, starts: Sequence[RoundStart]) -> list[RoundEnd]:
    """The local steps of all workers in `starts`, which are in the same round; the device is waited for once."""
    replicas, streams = _build_replicas(config, len(starts))
    ends = []
    for replica, stream, start in zip(replicas, streams, starts, strict=True):
        if stream:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):  # does nothing without one
            ends.append(take_round(config, start, replica))
    for stream in filter(None, streams):
        torch.cuda.current_stream(stream.device).wait_stream(stream)
    losses = torch.stack([torch.as_tensor(end.loss, dtype=torch.float64).reshape(()) for end in ends])
    return [replace(end, loss=loss) for end, loss in zip(ends, losses.tolist(), strict=True)]  # waits once


@functools.lru_cache(maxsize=1)
def _build_replicas(config: Config, count: int) -> tuple[list[Replica], list[torch.cuda.Stream | None]]:
    replicas = [build_replica(config) for _ in range(count)]
    if not config.device.startswith("cuda"):
        return replicas, [None] * count
    device = torch.device(config.device)
    return replicas, [torch.cuda.Stream(device) for _ in range(count)]  # type: ignore[no-untyped-call]
