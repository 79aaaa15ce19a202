"""The client: a message with the global arrays in, J local steps on this client's shard, a message out.

It answers three messages: ``train``; ``query.partition``, which shard it holds, of which data; and ``query.memory``,
which sends or restores what it keeps between rounds, so that the server's checkpoint is complete. The keys that shape
the result come with each train message; device and threads are the client's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedsim.config import Config, Value, own_keys
from fedsim.data.local_folder import check_named, check_of_run, digests_of_node, verify_images
from fedsim.device import is_out_of_memory, resolve
from fedsim.errors import UserError
from fedsim.federation.client_state import MemoryLost, keep_memory, memory_after, restore_memory
from fedsim.federation.flower_internals import CLIENT_FAILED
from fedsim.federation.protocol import MEMORY, MEMORY_LOST, MEMORY_ROUNDS, OWN_TEST, SEND_MEMORY, SHARED, decided_of
from fedsim.models import cpu_model
from fedsim.own_code import own_code
from fedsim.registry import names_own
from fedsim.training.client_tests import own_test
from fedsim.training.failures import memory_lacks
from fedsim.training.local_round import RoundEnd, RoundStart, check_machine, held_images, take_local_round
from fedsim.training.local_steps import Decisions
from fedsim.training.methods import layers_of, mean_of
from fedsim.training.run_plan import run_plan
from fedsim.training.workers import everyone
from strategies.batchnorm import batchnorm_buffers
from strategies.layers import Layers
from strategies.local_sgd import OF_HOLDERS
from strategies.method import Tensors, WorkerRound
from strategies.screening import DECLINED, wrong_values
from strategies.sections import Sections, join, split, under_prefix
from strategies.tensor_array import tensor_record, tensors_of
from strategies.wire import WIRE, without_model

app = ClientApp()
# Where one of these is the user's own code, what a client keeps may not be finite although its update is.
OF_MEMORY = ("optimizer", "outer", "local_rule", "layer", "momentum_at_sync", "batchnorm_at_sync", "compress")
TakeRounds = Callable[[Config, Sequence[RoundStart]], list[RoundEnd]]


@app.train()
def train(message: Message, context: Context) -> Message:
    """J local steps from the global arrays; replies with the arrays, the loss and the samples seen."""
    (reply,) = train_together(None, [message], [context])
    return reply


def train_together(
    take_rounds: TakeRounds | None, messages: Sequence[Message], contexts: Sequence[Context]
) -> list[Message]:
    """`train` for a group of clients of one process; `take_rounds` takes their local steps, by default one by one.

    Where memory lacks, the replies are errors that say so.
    """
    config = _config(messages[0], contexts[0])
    rounds: list[Begun | None] = []
    try:
        for message, context in zip(messages, contexts, strict=True):
            try:
                rounds.append(_begin(config, message, context))
            except MemoryLost:  # the server decides what becomes of the round
                rounds.append(None)
        own = [begun for begun in rounds if begun]
        starts = [begun.start for begun in own]
        ends = (
            take_rounds(config, starts)
            if take_rounds and own
            else [take_local_round(config, start) for start in starts]
        )
        replies = iter(_replies(config, own, ends))
        return [
            next(replies) if begun else _declined(message, MEMORY_LOST)
            for begun, message in zip(rounds, messages, strict=True)
        ]
    except Exception as error:
        return [_memory_lacks(error, config, message) for message in messages]


@app.query("partition")
def partition(message: Message, context: Context) -> Message:
    """Which shard this node holds, of how many, and the digests of its data and of the user's own code.

    Where clients weigh by their images, also how many it has.

    Fails where it cannot run as the run's keys and its own say.
    """
    config = _config(message, context)
    try:
        return _partition(config, message, context)
    except Exception as error:
        return _memory_lacks(error, config, message)


def _partition(config: Config, message: Message, context: Context) -> Message:
    verify_images(config)
    check_machine(config)
    inputs = {"data": ConfigRecord({**digests_of_node(config)}), "code": ConfigRecord({**own_code(config, True)})}
    held = MetricRecord()
    for name in ("partition-id", "num-partitions"):
        value = context.node_config.get(name)
        if type(value) is not int:
            raise UserError(f"{name} = {value} in the node config: give a whole number")
        held[name] = value
    if mean_of(config).by_shards and 0 <= _worker(context) < config.clients:
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
        return Message(RecordDict({MEMORY: _sendable(memory_after(context, round_))}), reply_to=message)
    except MemoryLost:
        return Message(RecordDict(), reply_to=message)


class Begun(NamedTuple):
    """A round that a client has begun: its message and context, what it received besides the model, and its memory."""

    message: Message
    context: Context
    round: WorkerRound
    received: Tensors
    memory: Tensors

    @property
    def start(self) -> RoundStart:
        r = self.round
        decided = decided_of(self.message.content.config_records["config"])
        return RoundStart(r.worker, r.round, {**r.start, **r.buffers}, r.optimizer, r.constant, decided)


def _begin(config: Config, message: Message, context: Context) -> Begun:
    """What the round of `message` starts from; raises MemoryLost where it needs a memory that is gone."""
    decided = decided_of(message.content.config_records["config"])
    layers, plan = _layers(config, decided), run_plan(config, decided)
    round_, worker = _round(message), _worker(context)
    parameters, buffers, received = split(tensors_of(message.content.array_records["arrays"]))
    memory = _memory(layers, message, context)
    if message.content.config_records["config"].get(OF_HOLDERS):
        own = under_prefix(f"{WIRE}/", memory)
        if not own:
            raise MemoryLost("the model that the message is a part or the change of is not kept here")
        parameters = layers.wire.receive(round_, own, parameters)
    r = WorkerRound(
        worker,
        round_,
        plan.steps_of(round_, worker, len(held_images(config, worker))),
        plan.rates,
        everyone(config),
        config.momentum,
        begun=parameters,
        start=parameters,
        buffers=buffers,
        batchnorm=functools.partial(_batchnorm, config),
        continues=_memory_round(message, context) == round_ - 1,
    )
    layers.begin(r, memory, received)
    return Begun(message, context, r, received, memory)


class Ended(NamedTuple):
    """What a client that has ended its round sends, before it is compressed, and what its layers keep."""

    sent: Sections
    kept: Tensors


def _replies(config: Config, rounds: Sequence[Begun], ends: Sequence[RoundEnd]) -> list[Message]:
    """The replies of all clients here; with compression, a GPU is waited for once, to see the values before it."""
    layers = _layers(config, rounds[0].start.decided) if rounds else Layers()
    ended = [_ended(layers, begun, end) for begun, end in zip(rounds, ends, strict=True)]
    sent = [each.sent.parameters for each in ended]
    wrong = wrong_values(sent) if layers.wire.up else [""] * len(ended)  # an infinity would stay in the residual
    own = layers.keeps_memory and any(names_own(getattr(config, name)) for name in OF_MEMORY)
    kept = wrong_values([each.kept for each in ended]) if own else []
    if any(kept):  # where the update is averaged, a memory that is not finite would spoil all later ones
        averaged = [not problem for problem in wrong_values(sent)]
        lost = [MEMORY_LOST if each and fine else "" for each, fine in zip(kept, averaged, strict=True)]
        wrong = [problem or each for problem, each in zip(wrong, lost, strict=True)]
    return [
        _declined(begun.message, problem) if problem else _reply(config, layers, begun, end, each)
        for begun, end, each, problem in zip(rounds, ends, ended, wrong, strict=True)
    ]


def _ended(layers: Layers, begun: Begun, end: RoundEnd) -> Ended:
    """What the local steps of one client led to; its values are not looked at."""
    r = begun.round
    r.y = {name: end.weights[name] for name in r.begun}
    r.buffers = {name: end.weights[name] for name in r.buffers}
    r.optimizer, r.mean_gradient = end.state, end.mean_gradient
    replies, kept = layers.end(r, begun.memory, begun.received)
    return Ended(Sections(r.y, r.buffers, replies), kept)


def _reply(config: Config, layers: Layers, begun: Begun, end: RoundEnd, ended: Ended) -> Message:
    message, context, r = begun.message, begun.context, begun.round
    parameters, of_wire = layers.message(r, ended.sent.parameters, begun.memory)
    weight = len(held_images(config, r.worker)) if mean_of(config).by_shards else end.samples
    metrics = MetricRecord({"num-examples": weight, "train-loss": float(end.loss)})
    if run_plan(config, begun.start.decided).tests_clients(r.round):
        metrics[OWN_TEST] = own_test(config, r.worker, end.weights)
    content = RecordDict(
        {"arrays": tensor_record(join(ended.sent._replace(parameters=parameters))), "metrics": metrics}
    )
    if layers.keeps_memory:
        record = tensor_record({**ended.kept, **of_wire})
        keep_memory(context, record, r.round, _memory_round(message, context))
        if message.content.config_records["config"][SEND_MEMORY]:
            content[MEMORY] = _sendable(record)
    return Message(content, reply_to=message)


def _memory_lacks(error: Exception, config: Config, message: Message) -> Message:
    """The error reply of a client for which `error` says that memory lacks; raises any other `error`."""
    if not is_out_of_memory(error):
        raise error
    return Message(Error(CLIENT_FAILED, memory_lacks(config)), reply_to=message)


def _declined(message: Message, reason: str) -> Message:
    return Message(RecordDict({DECLINED: ConfigRecord({"reason": reason})}), reply_to=message)


def _memory(layers: Layers, message: Message, context: Context) -> dict[str, Tensor]:
    """What this client kept after the last round in which its update was averaged; raises MemoryLost."""
    return tensors_of(memory_after(context, _memory_round(message, context))) if layers.keeps_memory else {}


def _sendable(memory: ArrayRecord) -> ArrayRecord:
    """A memory as it is sent for a checkpoint: without the model, which the server has."""
    return tensor_record(without_model(tensors_of(memory)))


def _worker(context: Context) -> int:
    return int(context.node_config["partition-id"])


def _round(message: Message) -> int:
    return int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]


def _memory_round(message: Message, context: Context) -> int:
    """After which round this client starts: the last in which its update was averaged."""
    return message.content.config_records["config"][MEMORY_ROUNDS][_worker(context)]  # type: ignore[index,return-value]


@functools.lru_cache(maxsize=8)  # every client asks in every round
def _layers(config: Config, decided: Decisions) -> Layers:
    return layers_of(config, decided=decided)


@functools.lru_cache(maxsize=8)  # a model is built for it
def _batchnorm(config: Config) -> Mapping[str, str]:
    return batchnorm_buffers(cpu_model(config))


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
