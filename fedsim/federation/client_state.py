"""What a client keeps between rounds: its memory, one record of named tensors, in Flower's ``context.state``.

Two versions are kept, since a round is repeated where too few updates arrived, and an update may be refused or come
too late: the client then starts from the memory before it. The server says after which round it wants the memory;
after round 0 it is empty.
"""

from __future__ import annotations

from flwr.app import ArrayRecord, ConfigRecord, Context

CURRENT, PREVIOUS = "memory", "memory-previous"
ROUNDS = "memory-rounds"  # after which round each of the two is


class MemoryLost(Exception):
    """The memory asked for is not here: the client's node has restarted since."""


def memory_after(context: Context, round_: int) -> ArrayRecord:
    """The memory after a round."""
    if round_ == 0:
        return ArrayRecord()
    rounds = _rounds(context)
    for name in (CURRENT, PREVIOUS):
        if rounds.get(name) == round_:
            return context.state.array_records[name]
    raise MemoryLost(f"the memory after round {round_} is not kept here")


def keep_memory(context: Context, memory: ArrayRecord, round_: int, started_after: int) -> None:
    """Keep the memory after a round, and the one that the round started from."""
    context.state[PREVIOUS] = memory_after(context, started_after)
    context.state[CURRENT] = memory
    context.state[ROUNDS] = ConfigRecord({CURRENT: round_, PREVIOUS: started_after})


def restore_memory(context: Context, memory: ArrayRecord, round_: int) -> None:
    """Keep a memory that the server hands back, as the one after a round, and nothing else."""
    context.state[CURRENT] = memory
    context.state[PREVIOUS] = ArrayRecord()
    context.state[ROUNDS] = ConfigRecord({CURRENT: round_, PREVIOUS: 0})


def forget_others(context: Context, round_: int) -> None:
    """Free the version that is not the memory after `round_`, where that one is kept.

    Safe once the server has said that it starts the next round from `round_`: it goes back to other rounds only by
    handing their memory back.
    """
    if PREVIOUS in context.state and (round_ == 0 or round_ in _rounds(context).values()):
        restore_memory(context, memory_after(context, round_), round_)


def _rounds(context: Context) -> ConfigRecord:
    return context.state.config_records.get(ROUNDS, ConfigRecord())
