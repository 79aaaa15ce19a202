"""What a client keeps between rounds: its optimizer's state after its last round, and the one that it began that from.

A round whose average did not come about is taken again, and an update that came too late never counted: its client
then begins from the state before. The server says after which round it wants the state; round 0 is a new optimizer's.
"""

from __future__ import annotations

from flwr.app import ArrayRecord, ConfigRecord, Context

AFTER, BEFORE = "optimizer", "optimizer-before"
ROUNDS = "optimizer-rounds"  # of which round each of the two is the state


class StateLost(Exception):
    """The state asked for is not kept: the client's node has been restarted since."""


def kept_state(context: Context, round: int) -> ArrayRecord:
    """The optimizer's state after `round`."""
    rounds = context.state.config_records.get(ROUNDS, ConfigRecord())
    if round == 0:
        return ArrayRecord()
    for name in (AFTER, BEFORE):
        if rounds.get(name) == round:
            return context.state.array_records[name]
    raise StateLost(f"the optimizer's state after round {round} is not kept here")


def keep_state(context: Context, state: ArrayRecord, round: int, begun_after: int) -> None:
    """Keep the state after `round`, which was begun with the state after `begun_after`."""
    context.state[BEFORE] = kept_state(context, begun_after)
    context.state[AFTER] = state
    context.state[ROUNDS] = ConfigRecord({AFTER: round, BEFORE: begun_after})


def put_state(context: Context, state: ArrayRecord, round: int) -> None:
    """Keep a state that the server hands back, as the state after `round`, and nothing else."""
    context.state[AFTER] = state
    context.state[BEFORE] = ArrayRecord()
    context.state[ROUNDS] = ConfigRecord({AFTER: round, BEFORE: 0})
