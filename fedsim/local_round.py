"""What a client does in a round: J local steps on its shard, from the global weights and its optimizer's state."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from fedsim.config import Config
from fedsim.data import batches, classes_of, load_dataset, sample_order, shard, training_images
from fedsim.engine import take_steps
from fedsim.machine import prepare
from fedsim.models import blank_model, set_dropout_streams
from fedsim.node_data import own_images
from fedsim.optim import build_optimizer, load_optimizer_state, optimizer_state
from fedsim.streams import numpy_stream, torch_stream
from fedsim.sync import plan


@dataclass(frozen=True)
class Start:
    """Where a worker begins `round` (counted from 0)."""

    worker: int
    round: int
    weights: dict[str, Tensor]
    state: dict[str, Tensor]


@dataclass(frozen=True)
class End:
    """Where it ends: weights and state of its own, the mean training loss and the samples seen."""

    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    loss: float
    samples: int


@dataclass
class Replica:
    """A model and its optimizer, lent to one client at a time."""

    model: nn.Module
    optimizer: Optimizer


_of_thread = threading.local()


def take_round(config: Config, start: Start) -> End:
    """The local steps of one worker, on this thread's replica."""
    replica = _replica(config)
    named = dict(replica.model.named_parameters())
    replica.model.load_state_dict(start.weights)
    load_optimizer_state(named, replica.optimizer, start.state)
    set_dropout_streams(replica.model, [dropout_stream(config, start)])
    lr = plan(config, training_images(config)).lr
    steps = local_batches(config, start)
    loss = take_steps(replica.model, replica.optimizer, steps, lr, start.round * config.local_steps, config.precision)
    weights = {name: value.clone() for name, value in replica.model.state_dict().items()}
    samples = config.local_steps * config.batch_size
    return End(weights, optimizer_state(named, replica.optimizer), loss, samples)


def local_batches(config: Config, start: Start) -> Iterator[tuple[Tensor, Tensor]]:
    """The J augmented batches of a worker's round, all of full size, of its own images or of its shard."""
    samples = config.local_steps * config.batch_size

    def order(size: int) -> NDArray[np.int64]:
        return sample_order(
            size, start.round * samples, samples, config.seed, start.worker, start.round, config.reshuffle
        )

    if own := own_images(config):
        images, index = own.take(order(len(own)), config), np.arange(samples)
    else:
        images = load_dataset(config).train
        held = shard(len(images), config.clients, start.worker, config.seed)
        index = held[order(len(held))]
    augment = numpy_stream(config.seed, start.worker, start.round, "augment")
    return batches(images, index, config.batch_size, augment)


def dropout_stream(config: Config, start: Start) -> torch.Generator:
    """The stream of a worker's dropout masks in its round."""
    return torch_stream(config.seed, start.worker, start.round, "dropout", torch.device(config.device))


def _replica(config: Config) -> Replica:
    """This thread's replica for `config`: as many live as there are threads, however many clients."""
    if getattr(_of_thread, "config", None) != config:
        prepare(config)
        model = blank_model(config.model, classes_of(config), config.device, config.precision)
        optimizer = build_optimizer(config, dict(model.named_parameters()))
        _of_thread.config, _of_thread.replica = config, Replica(model, optimizer)
    replica: Replica = _of_thread.replica
    return replica
