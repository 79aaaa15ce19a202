"""The client: a message with the global arrays in, J local steps on this client's shard, a message out.

It answers three messages: ``train``; ``query.partition``, which shard it holds; and ``query.state``, which hands out
or takes back the optimizer state that it keeps between rounds, so that the server's checkpoint is complete.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedsim import fused
from fedsim.config import Config, Value, own_keys
from fedsim.local_round import End, Start, take_round
from fedsim.machine import resolve
from fedsim.node_data import check_named
from fedsim.sync import join, split
from strategies import tensor_record, tensors_of

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """J local steps from the global arrays; replies with the arrays, the loss and the samples seen."""
    return _reply(message, context, take_round(_config(context), _start(message, context)))


def train_together(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    """`train` for several clients of one process at once, their replicas side by side."""
    starts = [_start(message, context) for message, context in zip(messages, contexts, strict=True)]
    ends = fused.take_rounds(_config(contexts[0]), starts)
    return [_reply(*reply) for reply in zip(messages, contexts, ends, strict=True)]


@app.query("partition")
def partition(message: Message, context: Context) -> Message:
    """Which shard this node holds, of how many."""
    held = MetricRecord()
    for name in ("partition-id", "num-partitions"):
        held[name] = int(context.node_config[name])
    return Message(RecordDict({"partition": held}), reply_to=message)


@app.query("state")
def state(message: Message, context: Context) -> Message:
    """Take back the optimizer state in the message, if there is one; reply with the state held."""
    if "optimizer" in message.content:
        context.state["optimizer"] = message.content["optimizer"]
    held = context.state.array_records.get("optimizer", ArrayRecord())
    return Message(RecordDict({"optimizer": held}), reply_to=message)


def _start(message: Message, context: Context) -> Start:
    weights, averaged_state = split(tensors_of(message.content.array_records["arrays"]))
    kept_state = tensors_of(context.state.array_records.get("optimizer", ArrayRecord()))
    return Start(
        worker=int(context.node_config["partition-id"]),
        round=int(message.content.config_records["config"]["server-round"]) - 1,  # type: ignore[arg-type]
        weights=weights,
        state={"keep": kept_state, "reset": {}, "average": averaged_state}[_config(context).momentum_at_sync],
    )


def _reply(message: Message, context: Context, end: End) -> Message:
    policy = _config(context).momentum_at_sync
    if policy == "keep":
        context.state["optimizer"] = tensor_record(end.state)
    arrays = tensor_record(join(end.weights, end.state if policy == "average" else {}))
    metrics = MetricRecord({"num-examples": end.samples, "train-loss": end.loss})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def _config(context: Context) -> Config:
    return _resolved(tuple(context.run_config.items()), tuple(own_keys(context.node_config).items()))


@functools.lru_cache(maxsize=8)
def _resolved(keys: tuple[tuple[str, Value], ...], own: tuple[tuple[str, Value], ...]) -> Config:
    config = resolve(Config().changed({**dict(keys), **dict(own)}), "localsgd")
    if "data-dir" in dict(own):
        check_named(config)
    return config
