"""What server and clients agree on: which keys and records their messages hold, and under which names.

The arrays of a message are told apart by `strategies.sections`.
"""

from __future__ import annotations

from flwr.app import ConfigRecord

from fedsim.config import Config, Value
from fedsim.training.local_steps import Decisions

MEMORY = "memory"  # record of what a client keeps between rounds
MEMORY_ROUNDS = "memory-rounds"  # for each worker, the last round in which its update was averaged
SEND_MEMORY = "send-memory"  # whether a client sends its memory along with its update, for a checkpoint
DECIDED = "decided-local-steps"  # where J is decided while the run trains: from which local step on, which J, in turn
OWN_TEST = "own-test"  # metric of a client's own model on its share of the test data
MEMORY_LOST = "it has lost what it kept between rounds and starts again without"  # why a client declines a round
# The keys that messages bring from the server: those that shape the result, except for the machine's own
SHARED = [name for name in Config().identity("localsgd") if name not in ("device", "threads")]


def announced(decided: Decisions) -> dict[str, list[int]]:
    """What the schedule of J has decided so far, as a message brings it; empty where it decides nothing."""
    return {DECIDED: [number for decision in decided for number in decision]} if decided else {}


def decided_of(config: ConfigRecord) -> Decisions:
    """The same, of the config of a message."""
    numbers: list[int] = config.get(DECIDED, [])  # type: ignore[assignment]
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def shared(config: Config) -> dict[str, Value]:
    """The keys of `config` that its messages bring."""
    keys = config.as_keys()
    return {name: keys[name] for name in SHARED}
