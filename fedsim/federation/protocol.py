"""What server and clients agree on: which keys and records their messages hold, and under which names.

The arrays of a message are told apart by `strategies.sections`.
"""

from __future__ import annotations

import itertools

from fedsim.config import Config, Value
from strategies.robust import trimmed_of

OPTIMIZER = "optimizer/"  # prefix of optimizer state, in a client's memory and among the extras that are averaged
CONTROL = "control/"  # prefix of SCAFFOLD's control variates: c_k in a client's memory, c among the extras
CORRECTION = "correction/"  # prefix of SCAFFOLD's c - c_k in a client's memory, where it infers them
SENT = "sent/"  # prefix of the parameters that a client sent last, in its memory, where it infers the next c - c_k
COMPRESS = "compress/"  # prefix of what a client remembers of its messages, in its memory
BATCHNORM = "batchnorm/"  # prefix of a client's own BatchNorm statistics, in its memory
OWN = "own/"  # prefix of a client's own parameters and buffers, in its memory, where the mean arrives late
MODEL = "model/"  # prefix of the parameters that a client began its round from; the server has them too
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


def keeps_memory(config: Config) -> bool:
    """Whether a client keeps anything between rounds; see the prefixes above."""
    compresses = config.compress != "none" and (config.error_feedback or config.compress == "powersgd")
    own = config.momentum_at_sync == "keep" or config.batchnorm_at_sync == "local"
    own |= config.local_rule in ("scaffold", "scaffold-inferred")
    return own or compresses or config.compress_down != "none" or config.delay > 0


def needs_all_memories(config: Config) -> bool:
    """Whether no client may start again without its memory.

    SCAFFOLD's c contains the c_k of every client. If all clients take part in every round, c is computed again in each.
    Otherwise a lost c_k would stay part of it. Inferred corrections must add up to zero.
    """
    sampled = config.clients_per_round < config.clients
    return config.local_rule == "scaffold-inferred" or (config.local_rule == "scaffold" and sampled)


def fewest_updates(config: Config) -> int:
    """How many usable updates a round needs.

    Where corrections are inferred, x must be the mean of all clients. A robust mean of too few is no robust one.
    """
    if config.local_rule == "scaffold-inferred":
        return config.clients
    return max(config.min_clients or 1, fewest_for_mean(config))


def fewest_for_mean(config: Config) -> int:
    """The fewest updates of which the mean leaves one out that is unlike the others."""
    if config.mean == "exact":
        return 1
    if config.mean == "trimmed" and config.trim:
        return next(workers for workers in itertools.count(3) if trimmed_of(config.trim, workers))
    return 3
