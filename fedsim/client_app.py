"""The client: a message with the global arrays in, J local steps on this client's shard, a message out.

It answers three messages: ``train``; ``query.partition``, which shard it holds; and ``query.state``, which hands out
or takes back the optimizer state that it keeps between rounds, so that the server's checkpoint is complete.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.optim import Optimizer

from fedsim.config import Config, Value
from fedsim.data import batches, load_dataset, sample_order, shard
from fedsim.engine import take_steps
from fedsim.machine import resolve
from fedsim.models import blank_model, set_dropout_stream
from fedsim.optim import build_optimizer, load_optimizer_state, optimizer_state
from fedsim.streams import numpy_stream, torch_stream
from fedsim.sync import join, plan, split
from strategies import tensor_record, tensors_of

app = ClientApp()


@dataclass
class Replica:
    """A model and its optimizer, lent to one client at a time: its state comes with every message."""

    model: nn.Module
    optimizer: Optimizer


_of_thread = threading.local()


@app.train()
def train(message: Message, context: Context) -> Message:
    """J local steps from the global arrays; replies with the arrays, the loss and the samples seen."""
    config = _config(tuple(context.run_config.items()))
    worker = int(context.node_config["partition-id"])
    round = int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
    replica = _replica(config)

    weights, averaged_state = split(tensors_of(message.content.array_records["arrays"]))
    replica.model.load_state_dict(weights)
    kept_state = tensors_of(context.state.array_records.get("optimizer", ArrayRecord()))
    state = {"keep": kept_state, "reset": {}, "average": averaged_state}
    load_optimizer_state(replica.model, replica.optimizer, state[config.momentum_at_sync])

    loss, samples = _local_round(config, replica, worker, round - 1)

    state_now = optimizer_state(replica.model, replica.optimizer)
    if config.momentum_at_sync == "keep":
        context.state["optimizer"] = tensor_record(state_now)
    weights = {name: value.clone() for name, value in replica.model.state_dict().items()}
    arrays = join(weights, state_now if config.momentum_at_sync == "average" else {})
    metrics = MetricRecord({"num-examples": samples, "train-loss": loss})
    return Message(RecordDict({"arrays": tensor_record(arrays), "metrics": metrics}), reply_to=message)


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


def _local_round(config: Config, replica: Replica, worker: int, round: int) -> tuple[float, int]:
    """Take the local steps of `round` (counted from 0): mean training loss and samples seen."""
    data = load_dataset(config)
    images = shard(len(data.train), config.clients, worker, config.seed)
    samples = config.local_steps * config.batch_size
    order = sample_order(len(images), round * samples, samples, config.seed, worker, round, config.reshuffle)
    augment = numpy_stream(config.seed, worker, round, "augment")
    dropout = torch_stream(config.seed, worker, round, "dropout", torch.device(config.device))
    set_dropout_stream(replica.model, dropout)
    lr = plan(config, len(data.train)).lr
    stream = batches(data.train, images[order], config.batch_size, augment)
    return take_steps(replica.model, replica.optimizer, stream, lr, round * config.local_steps), samples


@functools.lru_cache(maxsize=8)
def _config(items: tuple[tuple[str, Value], ...]) -> Config:
    return resolve(Config().changed(dict(items)), "localsgd")


def _replica(config: Config) -> Replica:
    """This thread's replica for `config`: as many live as there are threads, however many clients."""
    if getattr(_of_thread, "config", None) != config:
        torch.set_num_threads(config.threads)
        model = blank_model(config.model, load_dataset(config).classes, config.device)
        _of_thread.config, _of_thread.replica = config, Replica(model, build_optimizer(config, model))
    replica: Replica = _of_thread.replica
    return replica
