"""One round of LocalSGD, seen from the server: the global arrays out, the clients' arrays in, their average."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from torch import nn

from fedsim.config import Config
from fedsim.data.partition import shard_sizes
from fedsim.errors import RunFailed
from fedsim.federation.decisions import Decided, decide
from fedsim.federation.messenger import Messenger, payload
from fedsim.federation.node_registry import NodeRegistry
from fedsim.federation.protocol import MEMORY, MEMORY_LOST, MEMORY_ROUNDS, OWN_TEST, SEND_MEMORY, announced, shared
from fedsim.federation.shapes import zeros_of
from fedsim.runs.columns import OF_OWN_MODELS, OF_UPDATES, names_with
from fedsim.runs.records import Row
from fedsim.system.locks import GLOBAL_GENERATORS
from fedsim.training.client_tests import own_tests
from fedsim.training.local_steps import Decisions, DecisionState
from fedsim.training.methods import layers_of
from fedsim.training.run_plan import RunPlan, run_plan
from fedsim.training.workers import everyone
from strategies.arguments import kebab
from strategies.errors import StrategyFailed
from strategies.local_sgd import Aggregate, LocalSGD, Request
from strategies.method import State
from strategies.screening import not_finite
from strategies.sections import buffers_of, join, sections
from strategies.tensor_array import payload_bytes, tensor_record

DRIFT = names_with(OF_UPDATES)


@dataclass(frozen=True)
class Progress:
    """How far a run has come: with the clients' memories, all that its next round depends on."""

    round: int
    arrays: ArrayRecord
    last_aggregated_round: list[int]  # for each worker; 0: it starts without memory
    state: dict[str, State] = field(default_factory=dict)  # the server's of each layer
    update_bytes_up: int = 0  # of the updates averaged
    update_bytes_down: int = 0  # of the global arrays sent in the rounds averaged
    peak_bytes_up: int = 0  # the most of a round
    peak_bytes_down: int = 0  # the most of a round after the first, in which all are sent the model
    losses: list[tuple[float, float]] = field(default_factory=list)  # (mean, images) of each round since the last row
    left_out: dict[str, str] = field(default_factory=dict)  # since the last row
    updates_left_out: int = 0  # of the rounds averaged
    failures: dict[int, int] = field(default_factory=dict)  # worker -> how often in a row it has failed, if it has
    decided: Decisions = ()  # by the schedule of J, for the next round too
    decision_state: DecisionState = field(default_factory=dict)

    @property
    def holders(self) -> list[int]:
        """The workers that hold what the last round began from: those whose update of it was averaged."""
        return [worker for worker, last in enumerate(self.last_aggregated_round) if last == self.round > 0]


class TooFewClients(Exception):
    """Fewer usable updates than a round needs.

    `memory_lost`: because a client has lost its memory. `all_refused`: although all clients answered, none could be
    used; it may be that no client can train from what they were sent. `diverged`: what all of them sent is not finite.
    """

    def __init__(self, reason: str, memory_lost: bool, all_refused: bool = False, diverged: bool = False) -> None:
        super().__init__(reason)
        self.memory_lost = memory_lost
        self.all_refused = all_refused
        self.diverged = diverged


def initial_progress(config: Config, model: nn.Module) -> Progress:
    """The progress of a run that starts with the weights of `model`."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    arrays = join(sections(weights, buffers_of(model), {}))
    state = layers_of(config).initial(zeros_of(config, model))
    decided, decision_state = decide(config, 0, Decided(), None)
    progress = Progress(0, tensor_record(arrays), [0] * config.clients, state)
    return replace(progress, decided=decided, decision_state=decision_state)


def train_round(
    messenger: Messenger,
    config: Config,
    strategy: LocalSGD,
    registry: NodeRegistry,
    progress: Progress,
    with_memories: bool = False,
) -> tuple[Progress, dict[int, ArrayRecord], Row]:
    """The progress after one more round, what each worker averaged keeps after it, and columns of a row.

    The second is empty but `with_memories`. The third are the drift of the updates, without numbers where the round is
    not tested, and the tests of the clients' own models.

    Raises TooFewClients where too few send a usable update, RunFailed where their average is not finite, the strategy
    fails, or a client has failed too often.
    """
    nodes = registry.refresh()
    of_run = {**shared(config), **announced(progress.decided)}
    keys = ConfigRecord({**of_run, MEMORY_ROUNDS: progress.last_aggregated_round, SEND_MEMORY: with_memories})
    request = strategy.request(progress.round + 1, progress.arrays, keys, nodes, progress.state, progress.holders)
    replies = messenger.exchange(request.messages, config.round_timeout or math.inf)
    result = _aggregated(config, strategy, request, replies, progress)
    if MEMORY_LOST in result.left_out.values() and strategy.layers.needs_all_memories(everyone(config)):
        raise TooFewClients(f"round {progress.round + 1}: {format_reasons(result.left_out)}", True)
    plan, progress = run_plan(config, progress.decided), _after(config, progress, request, replies, result)
    seen: Row = {name: result.metrics.get(kebab(name)) for name in DRIFT}
    if plan.tests_clients(progress.round):
        own = {worker: metrics.get(OWN_TEST) for worker, metrics in result.averaged.items()}
        seen[OF_OWN_MODELS] = own_tests(config.clients, own)
    return progress, _sent_by(result.averaged, MEMORY, request, replies), seen


def _aggregated(
    config: Config, strategy: LocalSGD, request: Request, replies: Collection[Message], progress: Progress
) -> Aggregate:
    """What the strategy makes of the replies; raises TooFewClients where that is no average, RunFailed on failure."""
    round_ = progress.round + 1
    try:
        with GLOBAL_GENERATORS:  # a strategy of Flower's may draw from them
            result = strategy.aggregate(round_, request, replies, progress.state)
    except FloatingPointError as error:
        raise RunFailed(f"{error}: give a smaller lr") from error
    except StrategyFailed as error:
        raise RunFailed(f"outer = {config.outer}: {error}") from error
    if result.arrays is None:
        answered = {reply.metadata.src_node_id for reply in replies if reply.has_content()}
        all_answered = not request.away and answered >= request.workers.keys()
        all_refused = all_answered and len(result.left_out) == len(request.workers)
        raise TooFewClients(
            f"round {round_}: too few usable updates: {format_reasons(result.left_out)}",
            memory_lost=MEMORY_LOST in result.left_out.values(),
            all_refused=all_refused,
            diverged=all_refused and all(map(not_finite, result.left_out.values())),
        )
    return result


def _after(
    config: Config, before: Progress, request: Request, replies: Collection[Message], result: Aggregate
) -> Progress:
    """The progress after a round with an average; raises RunFailed where a client has failed too often."""
    round_ = before.round + 1
    assert result.arrays is not None
    failures = count_failures(before.failures, request, replies)
    for worker, reason in result.left_out.items():
        if failures.get(worker, 0) >= config.failures_to_end:
            raise RunFailed(
                f"round {round_}: worker {worker} has failed {failures[worker]} times in a row: {reason}; resume when "
                "it works again, or give a higher --max-failures"
            )
    lost = [worker for worker, reason in result.left_out.items() if reason == MEMORY_LOST]
    aggregated_in = dict.fromkeys(lost, 0) | dict.fromkeys(result.averaged, round_)
    bytes_up = sum(map(payload_bytes, _sent_by(result.averaged, "arrays", request, replies).values()))
    bytes_down = sum(map(payload, request.messages))
    loss = _loss(config, run_plan(config, before.decided), round_, result.averaged)
    decided = decide(config, round_, Decided(before.decided, before.decision_state), loss[0])
    return replace(
        before,
        round=round_,
        arrays=result.arrays,
        last_aggregated_round=[aggregated_in.get(k, last) for k, last in enumerate(before.last_aggregated_round)],
        state=result.state,
        update_bytes_up=before.update_bytes_up + bytes_up,
        update_bytes_down=before.update_bytes_down + bytes_down,
        peak_bytes_up=max(before.peak_bytes_up, bytes_up),
        peak_bytes_down=max(before.peak_bytes_down, bytes_down) if round_ > 1 else 0,
        losses=[*before.losses, loss],
        left_out=before.left_out | {str(worker): reason for worker, reason in result.left_out.items()},
        updates_left_out=before.updates_left_out + len(result.left_out),
        failures=failures,
        decided=decided.steps,
        decision_state=decided.state,
    )


def row_of(plan: RunPlan, progress: Progress, messenger: Messenger) -> Row:
    """The row of what has been trained, without tests.

    `bytes_up` and `bytes_down` are the method's traffic: the updates averaged, and the global arrays sent in the rounds
    averaged. The overheads are what was sent besides: refused and late updates, repeated rounds, memories for
    checkpoints and back.
    """
    steps = plan.first_step(progress.round + 1)
    images = math.fsum(of_round for _, of_round in progress.losses)
    return {
        "round": progress.round,
        "epoch": float(plan.epoch(progress.round)),
        "steps_done": steps,
        "round_steps": plan.steps(progress.round),
        "syncs": progress.round,
        "bytes_up": progress.update_bytes_up,
        "bytes_down": progress.update_bytes_down,
        "peak_bytes_up": progress.peak_bytes_up,
        "peak_bytes_down": progress.peak_bytes_down,
        "overhead_bytes_up": messenger.bytes_up - progress.update_bytes_up,
        "overhead_bytes_down": messenger.bytes_down - progress.update_bytes_down,
        "lr": plan.lr(steps - 1),
        "train_loss": math.fsum(loss * (of_round / images) for loss, of_round in progress.losses),
        "left_out": progress.left_out,
        "updates_left_out": progress.updates_left_out,
    }


def count_failures(before: Mapping[int, int], request: Request, replies: Iterable[Message]) -> dict[int, int]:
    """How often in a row each worker has failed, after a round; those that have not are left out.

    An error reply is a failure: the client raised, or its process ended. A client that was sampled and did not fail
    begins again at 0, also if its update is late or refused.
    """
    nodes = {reply.metadata.src_node_id for reply in replies if reply.has_error()}
    failed = [worker for node, worker in request.workers.items() if node in nodes]
    sampled = {*request.workers.values(), *request.away}
    earlier = {worker: count for worker, count in before.items() if worker not in sampled}
    return earlier | {worker: before.get(worker, 0) + 1 for worker in failed}


def _loss(config: Config, plan: RunPlan, round_: int, averaged: Mapping[int, MetricRecord]) -> tuple[float, float]:
    """The mean training loss of a round over the images that the averaged workers trained on, and their number."""
    held = shard_sizes(config) if config.local_epochs else [0] * config.clients  # local steps do not depend on it
    images = [len(plan.trained(round_, worker, held[worker])) for worker in averaged]
    losses = [float(metrics["train-loss"]) for metrics in averaged.values()]  # type: ignore[arg-type]
    total = sum(images)
    return math.fsum(loss * (count / total) for loss, count in zip(losses, images, strict=True)), float(total)


def recorded(progress: Progress) -> Progress:
    """`progress` once its row is written: losses and absences count from here."""
    return replace(progress, losses=[], left_out={})


def format_reasons(left_out: Mapping[int, str]) -> str:
    """The first three of the workers left out, with their reasons, and how many more there are."""
    reasons = [f"worker {worker}: {reason}" for worker, reason in sorted(left_out.items())]
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    return "; ".join(reasons[:3]) + more


def _sent_by(
    workers: Collection[int], name: str, request: Request, replies: Iterable[Message]
) -> dict[int, ArrayRecord]:
    """The array record of this name in the reply of each of `workers`, where there is one."""
    of_worker = {request.workers.get(reply.metadata.src_node_id): reply for reply in replies if reply.has_content()}
    records = {worker: of_worker[worker].content.array_records.get(name) for worker in workers}
    return {worker: record for worker, record in records.items() if record is not None}
