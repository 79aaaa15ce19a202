"""A run's checkpoint, clients' memories included, and the one way back to it: a resumed run's and a failed round's."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Annotated, Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from pydantic import Field
from torch import Tensor, nn

from fedsim.config import Config
from fedsim.federation.messenger import Messenger
from fedsim.federation.node_registry import Nodes
from fedsim.federation.protocol import MEMORY, MEMORY_ROUNDS
from fedsim.federation.round import Progress, TooFewClients
from fedsim.federation.shapes import domains, zeros_of
from fedsim.runs.checkpoint_file import Open, kind_of
from fedsim.runs.columns import Finite, Natural
from fedsim.runs.records import read_rows
from fedsim.runs.run import Run
from fedsim.training.methods import layers_of
from fedsim.training.run_plan import run_plan
from fedsim.training.workers import everyone
from strategies.screening import tensors_like, wrong_values
from strategies.sections import with_prefix
from strategies.tensor_array import tensor_record, tensors_of
from strategies.wire import WIRE, memory_of_holder

Memory = dict[str, Tensor]  # what a client keeps between rounds


def resume(run: Run, messenger: Messenger, nodes: Nodes, initial: Progress, rounds: int) -> Progress:
    """The progress of the run's checkpoint, its memories handed back to the clients; `initial` without a checkpoint.

    `rounds` are those of the whole run.
    Rows made after the checkpoint are dropped, but the bytes that were sent for them still count.
    """
    rows = read_rows(run.folder)
    checkpoint = run.resume(rounds, _like(initial, messenger))
    sent = [(messenger.bytes_up, messenger.bytes_down)]
    sent += [
        (row["bytes_up"] + row["overhead_bytes_up"], row["bytes_down"] + row["overhead_bytes_down"]) for row in rows
    ]
    sent += [(checkpoint["sent_up"], checkpoint["sent_down"])] if checkpoint else []
    messenger.bytes_up, messenger.bytes_down = map(max, zip(*sent, strict=True))
    if checkpoint is None:
        return initial
    held = {item.name: checkpoint[item.name] for item in fields(Progress)}
    progress = Progress(**{**held, "arrays": tensor_record(checkpoint["arrays"])})
    begun = with_prefix(f"{WIRE}/", memory_of_holder(progress.state.get(WIRE, {})))
    models = dict.fromkeys(progress.holders, begun)
    memories = {worker: {**memory, **models.get(worker, {})} for worker, memory in checkpoint["memories"].items()}
    hand_back(messenger, nodes, progress.last_aggregated_round, memories)
    return progress


def save(run: Run, config: Config, messenger: Messenger, progress: Progress, memories: Mapping[int, Memory]) -> None:
    """Save all that the run needs to resume; a client whose memory is not among `memories` then starts without."""
    last = progress.last_aggregated_round
    if layers_of(config).keeps_memory:
        last = [round_ if worker in memories else 0 for worker, round_ in enumerate(last)]
    run.save_checkpoint(_state(replace(progress, last_aggregated_round=last), memories, messenger))


def _like(initial: Progress, messenger: Messenger) -> dict[str, Any]:
    """What a valid checkpoint is like: the arrays of `initial`, and the types of everything else."""
    clients = len(initial.last_aggregated_round)
    return {
        **dict.fromkeys(_state(initial, {}, messenger), kind_of(Natural)),
        "arrays": tensors_of(initial.arrays),
        "last_aggregated_round": kind_of(Annotated[list[Natural], Field(min_length=clients, max_length=clients)]),
        "state": Open(initial.state),  # an outer step, or an own strategy, has none in the first round
        "losses": kind_of(list[tuple[Finite, Finite]]),
        "left_out": kind_of(dict[str, str]),
        "failures": kind_of(dict[Natural, Natural]),
        "decided": kind_of(tuple[tuple[Natural, Annotated[Natural, Field(ge=1)]], ...]),
        "decision_state": kind_of(dict[str, Finite]),
        "memories": kind_of(dict[Natural, Memory]),
    }


def _state(progress: Progress, memories: Mapping[int, Memory], messenger: Messenger) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {
        **vars(progress),
        "arrays": tensors_of(progress.arrays),
        "memories": dict(memories),
        "sent_up": messenger.bytes_up,
        "sent_down": messenger.bytes_down,
    }


def collect_memories(
    messenger: Messenger,
    config: Config,
    nodes: Nodes,
    progress: Progress,
    sent: Mapping[int, ArrayRecord],
    model: nn.Module,
) -> dict[int, Memory]:
    """The memory of every client that still has it, by worker.

    `sent` came along with the round's updates; the other clients are asked. Raises TooFewClients where fewer than
    min-clients have theirs.
    """
    layers = layers_of(config)
    if not layers.keeps_memory:
        return {}
    rounds = progress.last_aggregated_round
    question = RecordDict({"config": ConfigRecord({MEMORY_ROUNDS: rounds})})
    replies = messenger.ask("query.memory", {node: question for node, worker in nodes.items() if worker not in sent})
    records = dict(sent)
    for node, reply in replies.items():
        if reply.has_content() and MEMORY in reply.content.array_records:
            records[nodes[node]] = reply.content.array_records[MEMORY]

    memories: dict[int, Memory] = {}
    zero = zeros_of(config, model)
    like = layers.zero_memory(zero)
    for worker, record in sorted(records.items()):
        with contextlib.suppress(ValueError):  # what a client sends may be anything
            memories[worker] = tensors_like(record, tensor_record(like if rounds[worker] else {}))
    steps = run_plan(config, progress.decided).first_step(progress.round + 1)
    allowed = domains(like, zero.batchnorm, layers, steps)
    wrong = wrong_values(list(memories.values()), allowed)
    memories = {worker: memory for (worker, memory), reason in zip(memories.items(), wrong, strict=True) if not reason}
    lost = [worker for worker, round_ in enumerate(rounds) if round_ and worker not in memories]
    if len(memories) < (config.min_clients or 1) or (lost and layers.needs_all_memories(everyone(config))):
        raise TooFewClients(f"round {progress.round}: only {len(memories)} clients have their memory", True)
    return memories


def hand_back(messenger: Messenger, nodes: Nodes, rounds: list[int], memories: Mapping[int, Memory]) -> None:
    """Restore each client's memory as the one after its round in `rounds`."""
    config = ConfigRecord({MEMORY_ROUNDS: rounds})
    messenger.ask(
        "query.memory",
        {
            node: RecordDict({MEMORY: tensor_record(memories[worker]), "config": config})
            for node, worker in nodes.items()
            if worker in memories
        },
    )
