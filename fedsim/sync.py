"""What server and clients agree on: the length of the run, its schedule, and what stands where in their messages."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

from torch import Tensor

from fedsim.config import Config, Value
from fedsim.errors import UserError
from fedsim.schedule import Schedule, schedule_of
from strategies import sample_size

OPTIMIZER = "optimizer/"  # prefix of the optimizer state that is averaged with the model
STATE = "optimizer"  # record of the optimizer state that a client keeps
STATE_ROUNDS = "state-rounds"  # for each worker, the last round in which its update counted
SEND_STATE = "send-state"  # whether a client is to send its new state along with its update, for a checkpoint
STATE_LOST = "it does not keep its optimizer's state any more and begins anew"  # why a client declines
# The keys that messages bring from the server: those that shape the result but for what is the machine's
SHARED = [name for name in Config().identity("localsgd") if name not in ("device", "threads")]


class Plan(NamedTuple):
    """A run of LocalSGD: its rounds, the one to stop after for now, and the rate of each local step."""

    rounds: int
    last_round: int
    lr: Schedule


def plan(config: Config, images: int) -> Plan:
    """The plan of `config` on `images` training images; an epoch is counted over all sampled clients together."""
    sampled = sample_size(config.clients, config.fraction)
    if config.min_clients > sampled:
        raise UserError(f"min-clients = {config.min_clients} is more than the {sampled} clients of a round: give fewer")
    steps_per_epoch = Fraction(images, sampled * config.batch_size)

    def rounds_of(epochs: float) -> int:
        return max(1, round(epochs * steps_per_epoch / config.local_steps))

    rounds = config.rounds or rounds_of(config.epochs)
    stops = [rounds]
    if config.stop_after_rounds:
        stops.append(config.stop_after_rounds)
    if config.stop_after_epochs:
        stops.append(rounds_of(config.stop_after_epochs))
    epochs = float(rounds * config.local_steps / steps_per_epoch)
    return Plan(rounds, min(stops), schedule_of(config, steps_per_epoch, epochs, sampled))


def completes(config: Config, planned: Plan, round: int, every: int) -> bool:
    """Whether `round` is the one that completes another `every` rounds, or, where ``record-by`` says so, epochs."""
    if config.record_by == "round":
        return round % every == 0
    before, after = (Fraction(r * config.local_steps) / planned.lr.steps_per_epoch for r in (round - 1, round))
    return before // every < after // every


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
