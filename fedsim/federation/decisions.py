"""J decided while a run trains: before each round its schedule is asked, with what the server knows by then.

The server announces what was decided with the message of a round, and keeps it in the checkpoint.
"""

from __future__ import annotations

from typing import NamedTuple

from fedsim.config import Config
from fedsim.federation.traffic import messages_of
from fedsim.network import Network, is_summed, sync
from fedsim.training.local_steps import (
    Decisions,
    DecisionState,
    SoFar,
    decided_steps,
    local_steps_schedule,
    outline_of,
)
from fedsim.training.run_plan import RunPlan, run_plan


class Decided(NamedTuple):
    """What a schedule of J has decided so far, and what it remembers; both empty where it decides nothing."""

    steps: Decisions = ()
    state: DecisionState = {}  # noqa: RUF012


def decide(config: Config, round_: int, before: Decided, loss: float | None) -> Decided:
    """What is decided after a round (0: before the first one) with this mean training `loss`."""
    plan = run_plan(config, before.steps)
    if not local_steps_schedule(config).decides or round_ == plan.rounds:
        return before
    step, total = plan.first_step(round_ + 1), plan.first_step(plan.rounds + 1)
    steps_so_far = before.steps[-1][1] if before.steps else config.local_steps

    def sync_seconds(network: Network) -> float:
        workers, (up, down) = config.clients_per_round, messages_of(config).later
        found = sync(network, workers * up, workers * down, workers, is_summed(config.as_keys()))
        return float(found.waiting + found.transfer)

    run = outline_of(config, plan.steps_per_epoch, total, plan.lr)
    steps, state = decided_steps(config, run, SoFar(step, steps_so_far, loss, sync_seconds), before.state)
    changes = not before.steps or steps != steps_so_far
    return Decided((*before.steps, (step, steps)) if changes else before.steps, state)


def planned(config: Config) -> RunPlan:
    """The plan of a run before its first round: an estimate, where J is decided while it trains."""
    return run_plan(config, decide(config, 0, Decided(), None).steps)
