"""The network traffic of a run, and the seconds that it takes on a given network.

- LocalSGD sends what its rows record, up and down: a sync is a message up and a message down for each worker of the
  round. What a run sent besides (refused updates, repeated rounds, optimizer states for checkpoints) is overhead, which
  takes no time here.
- The large-batch baseline of K workers counts as data-parallel SGD on K workers, each with a K-th of the batch: a
  sync at every step sends the gradient up and the mean gradient down, 4 bytes per parameter, direction and worker.
- One worker (K = 1), and a centralized run that is not a baseline, is one machine: it has no syncs and sends no bytes.

`fedsim.network` says how long a sync takes.
"""

from __future__ import annotations

import pandas as pd

from fedsim.network import Network, sync

BYTES_PER_PARAMETER = 4  # float32


def add_traffic(records: pd.DataFrame) -> pd.DataFrame:
    """`records` (runs or rows) with `network_syncs`, and the bytes of all workers: `network_up`, `network_down`,
    `network_bytes` (both), the most that went one way in a round, `network_peak`, and what was sent besides,
    `overhead_bytes` (0 if not recorded).

    They are NaN where the recorded traffic, or the number of parameters of a baseline, is unknown. Requires the columns
    `clients`, `workers` and `baseline` of the cell, `parameters`, and the costs of a row.
    """
    baseline, alone = records["baseline"], records["clients"] == 1
    gradients = BYTES_PER_PARAMETER * records["parameters"] * records["workers"] * records["steps_done"]
    traffic = {"network_syncs": records["syncs"].where(~baseline, records["steps_done"])}
    for way in ("up", "down"):
        traffic[f"network_{way}"] = records[f"bytes_{way}"].where(~baseline, gradients)
    traffic["network_bytes"] = traffic["network_up"] + traffic["network_down"]
    peak = records[["peak_bytes_up", "peak_bytes_down"]].max(axis="columns")
    traffic["network_peak"] = peak.where(~baseline, BYTES_PER_PARAMETER * records["parameters"] * records["workers"])
    overhead = records["overhead_bytes_up"].fillna(0.0) + records["overhead_bytes_down"].fillna(0.0)
    traffic["overhead_bytes"] = overhead.mask(baseline, 0.0)
    return pd.concat([records, pd.DataFrame(traffic).mask(alone, 0.0)], axis=1)


def network_seconds(records: pd.DataFrame, network: Network) -> pd.DataFrame:
    """The communication of each record on `network`: the columns of `fedsim.network.Sync`.

    Requires the columns of `add_traffic` and, with all-reduce, `summed`: whether updates are summed on their way.
    """
    up, down, workers = (records[name] for name in ("network_up", "network_down", "workers"))
    summed = records["summed"] if network.link == "all-reduce" else False
    return pd.DataFrame(sync(network, up, down, workers, summed, records["network_syncs"])._asdict())
