"""The client: a message with the global arrays in, J local steps on this client's shard, a message out.

It answers three messages: ``train``; ``query.partition``, which shard it holds, of which data; and ``query.memory``,
which sends or restores what it keeps between rounds, so that the server's checkpoint is complete. The keys that shape
the result come with each train message; device and threads are the client's own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedsim.config import Config, Value, own_keys
from fedsim.data.local_folder import check_named, check_of_run, digests_of_node, verify_images
from fedsim.device import resolve
from fedsim.errors import UserError
from fedsim.federation.client_state import MemoryLost, keep_memory, memory_after, restore_memory
from fedsim.federation.compress import codec_of, compress_seed, compress_update, receive_change
from fedsim.federation.protocol import (
    BATCHNORM,
    COMPRESS,
    CONTROL,
    CORRECTION,
    MEMORY,
    MEMORY_LOST,
    MEMORY_ROUNDS,
    MODEL,
    OPTIMIZER,
    OWN,
    SEND_MEMORY,
    SENT,
    SHARED,
    keeps_memory,
)
from fedsim.models import initial_model
from fedsim.own_code import own_code
from fedsim.training.local_round import RoundEnd, RoundStart, check_machine, held_images, take_round
from fedsim.training.local_rule import Tensors, control_message, control_variate, correction_of, inferred_correction
from fedsim.training.run_plan import run_plan
from strategies import DECLINED, batchnorm_buffers, join, sections, split, tensor_record, tensors_of
from strategies.local_sgd import ENCODED
from strategies.screening import wrong_values
from strategies.sections import Sections, under_prefix, with_prefix

app = ClientApp()
TakeRounds = Callable[[Config, Sequence[RoundStart]], list[RoundEnd]]


@app.train()
def train(message: Message, context: Context) -> Message:
    """J local steps from the global arrays; replies with the arrays, the loss and the samples seen."""
    (reply,) = train_together(_one_by_one, [message], [context])
    return reply


def train_together(take_rounds: TakeRounds, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    """`train` for a group of clients of one process, whose local steps `take_rounds` takes."""
    config = _config(messages[0], contexts[0])
    rounds: list[Begun | None] = []
    for message, context in zip(messages, contexts, strict=True):
        try:
            rounds.append(_begin(config, message, context))
        except MemoryLost:  # the server decides what becomes of the round
            rounds.append(None)
    own = [begun for begun in rounds if begun]
    ends = take_rounds(config, [begun.start for begun in own]) if own else []
    ended = zip(ends, _ended(config, own, ends), strict=True)
    return [
        _reply(config, message, context, begun, *next(ended)) if begun else _declined(message, MEMORY_LOST)
        for begun, message, context in zip(rounds, messages, contexts, strict=True)
    ]


def _one_by_one(config: Config, starts: Sequence[RoundStart]) -> list[RoundEnd]:
    return [take_round(config, start) for start in starts]


@app.query("partition")
def partition(message: Message, context: Context) -> Message:
    """Which shard this node holds, of how many, and the digests of its data and of the user's own code.

    Where clients weigh by their images, also how many it has.

    Fails where it cannot run as the run's keys and its own say.
    """
    config = _config(message, context)
    verify_images(config)
    check_machine(config)
    inputs = {"data": ConfigRecord({**digests_of_node(config)}), "code": ConfigRecord({**own_code(config, True)})}
    held = MetricRecord()
    for name in ("partition-id", "num-partitions"):
        value = context.node_config.get(name)
        if type(value) is not int:
            raise UserError(f"{name} = {value} in the node config: give a whole number")
        held[name] = value
    if config.client_weights == "shard-size" and 0 <= _worker(context) < config.clients:
        held["images"] = len(held_images(config, _worker(context)))
    return Message(RecordDict({"partition": held, **inputs}), reply_to=message)


@app.query("memory")
def memory(message: Message, context: Context) -> Message:
    """Restore the memory in the message, if there is one; else reply with the memory asked for, if it is kept."""
    round_ = _memory_round(message, context)
    if MEMORY in message.content:
        restore_memory(context, message.content.array_records[MEMORY], round_)
        return Message(RecordDict(), reply_to=message)
    try:
        return Message(RecordDict({MEMORY: _without_model(memory_after(context, round_))}), reply_to=message)
    except MemoryLost:
        return Message(RecordDict(), reply_to=message)


@dataclass(frozen=True)
class Begun:
    """A round that a client has begun: what it received, what it had kept, and where its local steps start."""

    received: Sections  # parameters that are encoded as they came
    memory: dict[str, Tensor]
    start: RoundStart


def _begin(config: Config, message: Message, context: Context) -> Begun:
    """What the round of `message` starts from; raises MemoryLost where it needs a memory that is gone."""
    received = split(tensors_of(message.content.array_records["arrays"]))
    memory = _memory(config, message, context)
    parameters = received.parameters
    if message.content.config_records["config"].get(ENCODED):
        held = under_prefix(MODEL, memory)
        if not held:
            raise MemoryLost("the model that the message is the change of is not kept here")
        parameters = receive_change(config, run_plan(config), _round(message), held, parameters)
    start = RoundStart(
        worker=_worker(context),
        round=_round(message),
        weights={**parameters, **received.buffers, **under_prefix(BATCHNORM, memory), **under_prefix(OWN, memory)},
        state=under_prefix(OPTIMIZER, {**received.extras, **memory}),  # averaged, kept, or none
        correction=_correction(config, message, received, memory),
    )
    return Begun(received, memory, start)


class Ended(NamedTuple):
    """What the local steps of a client led to."""

    x: dict[str, Tensor]  # the model of the round
    sent: Sections  # what the client sends if it is not compressed
    kept: dict[str, Tensor]  # what it keeps besides residuals
    wrong: str = ""  # with compression, what is wrong with the values of its parameters


def _reply(config: Config, message: Message, context: Context, begun: Begun, end: RoundEnd, ended: Ended) -> Message:
    x, sent, kept, wrong = ended
    if wrong:  # an infinity would stay in the residual
        return _declined(message, wrong)
    if codec := codec_of(config):
        seed = compress_seed(config, run_plan(config), _round(message), _worker(context))
        memory = under_prefix(COMPRESS, begun.memory)
        update, remembered = compress_update(config, codec, x, sent.parameters, memory, seed)
        sent = sent._replace(parameters=update)
        kept |= with_prefix(COMPRESS, remembered)
    weight = end.samples if config.client_weights == "equal" else len(held_images(config, _worker(context)))
    metrics = MetricRecord({"num-examples": weight, "train-loss": float(end.loss)})
    content = RecordDict({"arrays": tensor_record(join(sent)), "metrics": metrics})
    if keeps_memory(config):
        record = tensor_record(kept)
        keep_memory(context, record, _round(message), _memory_round(message, context))
        if message.content.config_records["config"][SEND_MEMORY]:
            content[MEMORY] = _without_model(record)
    return Message(content, reply_to=message)


def _ended(config: Config, rounds: Sequence[Begun], ends: Sequence[RoundEnd]) -> list[Ended]:
    """What the `ends` of all clients here led to; a GPU is waited for once, to see the values before compression."""
    ended = [_ended_alone(config, begun, end) for begun, end in zip(rounds, ends, strict=True)]
    if config.compress == "none":
        return ended
    wrong = wrong_values([each.sent.parameters for each in ended])
    return [each._replace(wrong=problem) for each, problem in zip(ended, wrong, strict=True)]


def _ended_alone(config: Config, begun: Begun, end: RoundEnd) -> Ended:
    """What the `end` of one client led to; its values are not looked at."""
    received, state, weights = begun.received, with_prefix(OPTIMIZER, end.state), end.weights
    x = sections(begun.start.weights, received.buffers, {}).parameters
    extras = dict(state) if config.momentum_at_sync == "average" else {}
    kept = dict(state) if config.momentum_at_sync == "keep" else {}
    if config.local_rule == "scaffold":
        c, c_k = _controls(config, received.extras, begun.memory)
        extras |= with_prefix(CONTROL, control_message(config, c, c_k, end.gradients))
        kept |= with_prefix(CONTROL, end.gradients)
    if config.local_rule == "scaffold-inferred":
        sent_parameters = {name: weights[name] for name in received.parameters}
        kept |= with_prefix(CORRECTION, begun.start.correction) | with_prefix(SENT, sent_parameters)
    if config.delay:
        own, x = x, received.parameters
        weights = weights | add_late(weights, x, own)
        kept |= with_prefix(OWN, weights)
    if config.compress_down != "none":
        kept |= with_prefix(MODEL, x)
    sent = sections(weights, received.buffers, extras)
    if config.batchnorm_at_sync == "local":
        kept |= {BATCHNORM + name: sent.buffers[name] for name in _batchnorm_names(config)}
    return Ended(x, sent, kept)


def add_late(z: Mapping[str, Tensor], x: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """y = z + (x - own), for each parameter in `x`: what a client sends where the mean arrives a round late.

    With `delay` = 1 it begins a round from its `own` parameters of the end of the last one, takes its local steps to
    `z`, and adds the difference from there to the model `x` that arrived in the meantime (CoCoD-SGD: Shen et al. 2019).
    It begins the next round from y. Clients so compute while models are on their way.
    """
    return {name: z[name] + (value.to(z[name].device) - own[name].to(z[name].device)) for name, value in x.items()}


@functools.lru_cache(maxsize=8)  # every client asks in every round, and a model would be built for it
def _batchnorm_names(config: Config) -> tuple[str, ...]:
    return tuple(batchnorm_buffers(initial_model(config)))


def _correction(
    config: Config, message: Message, received: Sections, memory: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """SCAFFOLD's c - c_k at the start of a round; empty with other rules."""
    if config.local_rule != "scaffold-inferred":
        return correction_of(*_controls(config, received.extras, memory))
    if not memory:
        return {name: torch.zeros_like(value) for name, value in received.parameters.items()}
    rates = math.fsum(run_plan(config).rates(_round(message) - 1))
    return inferred_correction(under_prefix(CORRECTION, memory), under_prefix(SENT, memory), received.parameters, rates)


def _controls(config: Config, extras: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
    """SCAFFOLD's c and c_k at the start of a round; empty with other rules."""
    c = under_prefix(CONTROL, extras)
    return c, control_variate(config, c, under_prefix(CONTROL, memory))


def _declined(message: Message, reason: str) -> Message:
    return Message(RecordDict({DECLINED: ConfigRecord({"reason": reason})}), reply_to=message)


def _memory(config: Config, message: Message, context: Context) -> dict[str, Tensor]:
    """What this client kept after the last round in which its update was averaged; raises MemoryLost."""
    return tensors_of(memory_after(context, _memory_round(message, context))) if keeps_memory(config) else {}


def _without_model(memory: ArrayRecord) -> ArrayRecord:
    """A memory as it is sent for a checkpoint: without the model, which the server has."""
    return tensor_record({name: value for name, value in tensors_of(memory).items() if not name.startswith(MODEL)})


def _worker(context: Context) -> int:
    return int(context.node_config["partition-id"])


def _round(message: Message) -> int:
    return int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]


def _memory_round(message: Message, context: Context) -> int:
    """After which round this client starts: the last in which its update was averaged."""
    return message.content.config_records["config"][MEMORY_ROUNDS][_worker(context)]  # type: ignore[index,return-value]


def _config(message: Message, context: Context) -> Config:
    sent = message.content.config_records["config"]
    of_run = {name: sent[name] for name in SHARED}
    of_node = own_keys(context.node_config)
    return _resolved(tuple({**context.run_config, **of_run}.items()), tuple(of_node.items()))


@functools.lru_cache(maxsize=8)
def _resolved(keys: tuple[tuple[str, Value], ...], own: tuple[tuple[str, Value], ...]) -> Config:
    config = resolve(Config().changed({**dict(keys), **dict(own)}), "localsgd")
    if "data-dir" in dict(own):
        check_named(config)
    else:
        check_of_run(config)
    return config
