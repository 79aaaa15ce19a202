"""All that fedsim uses of Flower beyond its public API, for running clients and server in one process.

Where one of these moves in a later version of Flower, `tests/strategies` and every in-process run fail at import or at
the first message; change it here alone. Look for: who reads `TaskIdentity` in `flwr.app.Message` (the sender of a
message), how `HttpGrid.push_messages` gives a message its id, what `Grid.set_run` and `Grid.run` hold, and what the
simulation's `worker` makes of an exception of Ray's.
"""

from __future__ import annotations

import re

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run as FlowerRun
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "CLIENT_FAILED",
    "FlowerRun",
    "actor_died",
    "become_server",
    "let_messages_be_made",
    "set_message_id",
    "simulates",
]

CLIENT_FAILED = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
SIMULATIONS = ("InMemoryGrid", "InProcessGrid")  # Flower's, on Ray, and fedsim's


def become_server(run_id: int, node_id: int) -> None:
    """Let messages be made in this process; in one of Flower's own this is set at its start."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, node_id


def let_messages_be_made() -> None:
    """The same where no run has begun in this process; its messages are not sent."""
    try:
        TaskIdentity.run_id  # noqa: B018
    except RuntimeError:
        become_server(1, 1)


def set_message_id(message: Message, id_: str) -> None:
    """Give a message the id that its reply refers to, as Flower's own grids do."""
    message.metadata.__dict__["_message_id"] = id_


def simulates(grid: Grid) -> bool:
    """Whether the clients of `grid` are the user's own, so that their errors are believed.

    In a deployment a client may write anything into its error.
    """
    return any(base.__name__ in SIMULATIONS for base in type(grid).__mro__)


def actor_died(reply: Message) -> bool:
    """Whether `reply`, an error in a simulation, says that a Ray actor of Flower's simulation has died.

    Flower gives a dead actor back to its pool, where it fails at every message that it is given from then on, whichever
    client's.
    """
    reason = reply.error.reason or ""
    of_ray = re.match(r"<class 'ray\.exceptions\.(?!RayTaskError)", reason)  # that one: the client raised
    return bool(of_ray) and reply.error.code == ErrorCode.UNKNOWN
