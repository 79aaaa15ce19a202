"""The client: a message with the global arrays in, J local steps on this client's shard, a message out.

It answers three messages: ``train``; ``query.partition``, which shard it holds; and ``query.state``, which hands out
or takes back the optimizer state that it keeps between rounds, so that the server's checkpoint is complete. What
shapes the result comes with each train message; device and threads are the client's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedsim.config import Config, Value, own_keys
from fedsim.data.local_folder import check_named
from fedsim.device import resolve
from fedsim.federation.client_state import StateLost, keep_state, kept_state, put_state
from fedsim.federation.protocol import SEND_STATE, SHARED, STATE, STATE_LOST, STATE_ROUNDS, join, split
from fedsim.training import stacked
from fedsim.training.local_round import End, Start, take_round
from strategies import DECLINED, tensor_record, tensors_of

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """J local steps from the global arrays; replies with the arrays, the loss and the samples seen."""
    config = _config(message, context)
    try:
        start = _start(config, message, context)
    except StateLost:  # the server decides what becomes of the round
        return Message(RecordDict({DECLINED: ConfigRecord({"reason": STATE_LOST})}), reply_to=message)
    return _reply(config, message, context, take_round(config, start))


def train_together(
    messages: Sequence[Message],
    contexts: Sequence[Context],
    take_rounds: Callable[[Config, Sequence[Start]], list[End]] = stacked.take_rounds,
) -> list[Message]:
    """`train` for several clients of one process at once, by default with their replicas as one stacked network."""
    config = _config(messages[0], contexts[0])
    starts = [_start(config, *pair) for pair in zip(messages, contexts, strict=True)]
    ends = take_rounds(config, starts)
    return [_reply(config, *reply) for reply in zip(messages, contexts, ends, strict=True)]


@app.query("partition")
def partition(message: Message, context: Context) -> Message:
    """Which shard this node holds, of how many; fails where it cannot run as the run's keys and its own say."""
    _config(message, context)
    held = MetricRecord()
    for name in ("partition-id", "num-partitions"):
        held[name] = int(context.node_config[name])
    return Message(RecordDict({"partition": held}), reply_to=message)


@app.query("state")
def state(message: Message, context: Context) -> Message:
    """Take back the optimizer state in the message, if there is one; reply with the state asked for, if it is kept."""
    round = _state_round(message, context)
    if STATE in message.content:
        put_state(context, message.content.array_records[STATE], round)
    try:
        return Message(RecordDict({STATE: kept_state(context, round)}), reply_to=message)
    except StateLost:
        return Message(RecordDict(), reply_to=message)


def _start(config: Config, message: Message, context: Context) -> Start:
    weights, state = split(tensors_of(message.content.array_records["arrays"]))  # averaged, or none
    if config.momentum_at_sync == "keep":
        state = tensors_of(kept_state(context, _state_round(message, context)))
    return Start(worker=_worker(context), round=_round(message), weights=weights, state=state)


def _reply(config: Config, message: Message, context: Context, end: End) -> Message:
    policy = config.momentum_at_sync
    arrays = tensor_record(join(end.weights, end.state if policy == "average" else {}))
    metrics = MetricRecord({"num-examples": end.samples, "train-loss": end.loss})
    content = RecordDict({"arrays": arrays, "metrics": metrics})
    if policy == "keep":
        state = tensor_record(end.state)
        keep_state(context, state, _round(message), _state_round(message, context))
        if message.content.config_records["config"][SEND_STATE]:
            content[STATE] = state
    return Message(content, reply_to=message)


def _worker(context: Context) -> int:
    return int(context.node_config["partition-id"])


def _round(message: Message) -> int:
    return int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]


def _state_round(message: Message, context: Context) -> int:
    """After which round this client is to begin: the last in which its update counted."""
    return message.content.config_records["config"][STATE_ROUNDS][_worker(context)]  # type: ignore[index,return-value]


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
    return config
