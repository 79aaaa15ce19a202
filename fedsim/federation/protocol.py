"""What server and clients agree on: which keys and records their messages hold, and under which names.

The arrays of a message are told apart by `strategies.sections`.
"""

from __future__ import annotations

from fedsim.config import Config, Value

MEMORY = "memory"  # record of what a client keeps between rounds
MEMORY_ROUNDS = "memory-rounds"  # for each worker, the last round in which its update was averaged
SEND_MEMORY = "send-memory"  # whether a client sends its memory along with its update, for a checkpoint
MEMORY_LOST = "it has lost what it kept between rounds and starts again without"  # why a client declines a round
# The keys that messages bring from the server: those that shape the result, except for the machine's own
SHARED = [name for name in Config().identity("localsgd") if name not in ("device", "threads")]


def shared(config: Config) -> dict[str, Value]:
    """The keys of `config` that its messages bring."""
    keys = config.as_keys()
    return {name: keys[name] for name in SHARED}
