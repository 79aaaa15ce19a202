"""Who averages with whom in a run, by its key `topology`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.registry import failures_of
from strategies.topology import Row, Topology


def topology_of(config: Config) -> Topology:
    """The topology of `config`; raises UserError where it cannot be made."""
    topology: Topology = config.made("topology")
    return topology


def rows_of(config: Config, round_: int) -> Sequence[Row]:
    """Whose models each client averages in a round; raises UserError where a topology of one's own fails."""
    with failures_of(f"topology = {config.topology} fails"):
        rows = topology_of(config).rows(round_, config.clients, config.seed)
    if not isinstance(rows, Sequence) or len(rows) != config.clients:
        raise UserError(f"topology = {config.topology} gives no row for each of {config.clients} clients: correct it")
    for row in {id(row): row for row in rows}.values():
        if not isinstance(row, Mapping) or not _is_valid(row, config.clients):
            raise UserError(
                f"topology = {config.topology} gives the row {row} in round {round_}: it must have a positive weight "
                f"for some of the clients 0 to {config.clients - 1}, and none for others"
            )
    return rows


def _is_valid(row: Row, clients: int) -> bool:
    known = all(type(worker) is int and 0 <= worker < clients for worker in row)
    numbers = all(isinstance(weight, int | float) and 0 <= weight < math.inf for weight in row.values())
    return known and numbers and any(row.values())
