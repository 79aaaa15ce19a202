"""One round of LocalSGD, seen from the server: the global arrays out, the clients' arrays in, their average."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedsim.config import Config
from fedsim.federation.node_registry import Roster, exchange
from fedsim.federation.protocol import SEND_STATE, STATE, STATE_LOST, STATE_ROUNDS, shared
from fedsim.records import Row
from fedsim.training.run_plan import RunPlan
from strategies import STRATEGIES, LocalSGD, array_bytes


@dataclass
class Progress:
    """How far a run has come."""

    round: int
    arrays: ArrayRecord
    counted: list[int]  # for each worker, the last round in which its update counted; 0: it begins anew
    bytes_up: int = 0
    bytes_down: int = 0
    losses: list[float] = field(default_factory=list)  # of each round since the last row
    left_out: dict[str, str] = field(default_factory=dict)  # since the last row


class TooFewClients(Exception):
    """No average: too few usable updates; `states_lost` where a client does not keep its optimizer's state any more."""

    def __init__(self, reason: str, states_lost: bool) -> None:
        super().__init__(reason)
        self.states_lost = states_lost


def build_strategy(config: Config, plan: RunPlan) -> LocalSGD:
    """The strategy of `config`; who is asked in a round stands in the round's roster."""
    return STRATEGIES[config.strategy](
        batchnorm_at_sync=config.batchnorm_at_sync,
        seed=config.seed,
        population=config.clients,
        fraction_train=config.fraction,
        min_updates=config.min_clients or 1,
        max_examples=plan.max_steps * config.batch_size,
        metrics=["train-loss"],
    )


def train_round(
    grid: Grid, config: Config, strategy: LocalSGD, roster: Roster, progress: Progress, with_states: bool = False
) -> dict[int, ArrayRecord]:
    """Take `progress` a round further; where too few clients send a usable update it stays as it is.

    Returns, `with_states`, the optimizer's state that each of the workers averaged keeps after it, where it keeps one.
    """
    roster.update()
    strategy.workers = roster.nodes
    round = progress.round + 1
    question = ConfigRecord({**shared(config), STATE_ROUNDS: progress.counted, SEND_STATE: with_states})
    messages = list(strategy.configure_train(round, progress.arrays, question, grid))
    replies = exchange(grid, messages, config.round_timeout or math.inf)
    states = {roster.nodes.get(reply.metadata.src_node_id): _state_taken_out(reply) for reply in replies}
    averaged, metrics = strategy.aggregate_train(round, replies)

    lost = [worker for worker, reason in strategy.left_out.items() if reason == STATE_LOST]
    if averaged is None or metrics is None:
        raise TooFewClients(f"round {round}: too few usable updates: {_told(strategy.left_out)}", bool(lost))
    progress.round = round
    progress.arrays = averaged
    for worker in lost:
        progress.counted[worker] = 0
    for worker in strategy.averaged:
        progress.counted[worker] = round
    progress.bytes_down += len(messages) * payload(progress.arrays)
    progress.bytes_up += len(strategy.averaged) * payload(progress.arrays)
    progress.losses.append(float(metrics["train-loss"]))  # type: ignore[arg-type]
    progress.left_out |= {str(worker): reason for worker, reason in strategy.left_out.items()}
    return {worker: state for worker in strategy.averaged if (state := states[worker]) is not None}


def row_of(plan: RunPlan, progress: Progress) -> Row:
    """The row of what has been trained; tests come to it."""
    steps = plan.first_step(progress.round + 1)
    return {
        "round": progress.round,
        "epoch": float(plan.epoch(progress.round)),
        "local_steps": steps,
        "syncs": progress.round,
        "bytes_up": progress.bytes_up,
        "bytes_down": progress.bytes_down,
        "lr": plan.lr(steps - 1),
        "train_loss": statistics.fmean(progress.losses),
        "left_out": progress.left_out,
    }


def payload(record: ArrayRecord) -> int:
    """The bytes of all arrays in `record`, headers not counted."""
    return sum(array_bytes(array) for array in record.values())


def _state_taken_out(reply: Message) -> ArrayRecord | None:
    """The state sent along with an update, of which the strategy knows nothing."""
    state = reply.content.pop(STATE, None) if reply.has_content() else None
    return state if isinstance(state, ArrayRecord) else None


def _told(left_out: dict[int, str]) -> str:
    told = [f"worker {worker}: {reason}" for worker, reason in sorted(left_out.items())]
    more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
    return "; ".join(told[:3]) + more
