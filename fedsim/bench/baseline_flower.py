"""A baseline of `bench`: LocalSGD with Flower alone, as in its tutorials.

The client builds model, optimizer and DataLoader for every message, and the server uses FedAvg, simulated on Ray. It
uses no engine, strategy or grid of fedsim. As in the tutorials, momentum is reset at every sync.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from fedsim.bench.baseline_torch import PilImages, PlainClient
from fedsim.config import Config
from fedsim.data.image_sets import load_images
from fedsim.models import build_model

client_app = ClientApp()


@client_app.train()
def train_client(message: Message, context: Context) -> Message:
    """J local steps on this client's shard."""
    sent = dict(message.content.config_records["config"])
    sent.pop("server-round")
    config = Config().changed(sent)
    classes, images = _data(config)
    model = build_model(config.model, classes, config.seed)
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    client = PlainClient(config, model, images, int(context.node_config["partition-id"]))
    losses = list(client.local_steps())
    metrics = MetricRecord({"num-examples": client.samples, "train-loss": losses[-1].item()})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@functools.cache
def _data(config: Config) -> tuple[int, PilImages]:
    """The number of classes and the training images, which a process keeps, as the tutorials' apps do."""
    data = load_images(config)
    return data.classes, PilImages(data.train.pixels(), data.train.labels.cpu())


def tutorial_rounds(config: Config, rounds: int) -> list[float]:
    """Seconds of each of `rounds` rounds, after a warm-up round."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    ends: list[float] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        model = build_model(config.model, load_images(config).classes, config.seed)
        FedAvg(fraction_evaluate=0.0, min_train_nodes=config.clients, min_available_nodes=config.clients).start(
            grid,
            ArrayRecord(model.state_dict()),
            num_rounds=rounds + 1,
            train_config=ConfigRecord(dict(config.as_keys())),
            evaluate_fn=lambda round_, arrays: ends.append(time.perf_counter()),  # also before the first round
        )

    share: Any = {"num_cpus": float(config.threads), "num_gpus": 0.0 if config.device == "cpu" else 1 / config.clients}
    run_simulation(server, client_app, config.clients, backend_config={"client_resources": share})
    return [end - begin for begin, end in itertools.pairwise(ends)][1:]
