"""What server and clients agree on: which keys, arrays and records their messages hold, and under which names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedsim.config import Config, Value

OPTIMIZER = "optimizer/"  # prefix of the optimizer state that is averaged with the model
STATE = "optimizer"  # record of the optimizer state that a client keeps
STATE_ROUNDS = "state-rounds"  # for each worker, the last round in which its update counted
SEND_STATE = "send-state"  # whether a client is to send its new state along with its update, for a checkpoint
STATE_LOST = "it does not keep its optimizer's state any more and begins anew"  # why a client declines
# The keys that messages bring from the server: those that shape the result but for what is the machine's
SHARED = [name for name in Config().identity("localsgd") if name not in ("device", "threads")]


def shared(config: Config) -> dict[str, Value]:
    """The keys of `config` that its messages bring."""
    keys = config.as_keys()
    return {name: keys[name] for name in SHARED}


def join(weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arrays of a message: the model's state_dict and the optimizer state that is averaged with it."""
    return {**weights, **{OPTIMIZER + name: value for name, value in optimizer.items()}}


def split(arrays: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A message's arrays as the model's state_dict and the optimizer state."""
    weights = {name: value for name, value in arrays.items() if not name.startswith(OPTIMIZER)}
    state = {name.removeprefix(OPTIMIZER): value for name, value in arrays.items() if name.startswith(OPTIMIZER)}
    return weights, state
