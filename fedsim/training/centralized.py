"""Centralized training: the large-batch rivals, one machine that sees every image."""

from __future__ import annotations

import math
from fractions import Fraction

from fedsim.config import Config
from fedsim.data.datasets import load_dataset, task_of
from fedsim.data.local_folder import check_of_run
from fedsim.data.partition import check_shards, sample_order, shard
from fedsim.device import prepare
from fedsim.errors import RunFailed, UserError
from fedsim.models import check_model, check_one_example, starting_model
from fedsim.optim import build_optimizer, check_optimizer, load_optimizer_state, optimizer_state, zero_state
from fedsim.optim.lr_schedule import schedule_of
from fedsim.runs.records import TRAFFIC
from fedsim.runs.run import Run
from fedsim.training.metrics import check_metrics, metrics_by_name
from fedsim.training.step import Learner, evaluate, step_inputs
from fedsim.training.step_fn import make_step_fn

NO_COMMUNICATION = {
    "syncs": 0,
    **dict.fromkeys(TRAFFIC, 0),
    "left_out": {},
    "updates_left_out": 0,
}  # in the rows of one machine


def check_centralized(config: Config) -> None:
    """Raise UserError where `config` (resolved) cannot be trained: its data, model or keys do not fit."""
    check_of_run(config)
    check_optimizer(config)
    images, task = len(load_dataset(config).train), task_of(config)
    task.check(config)
    check_model(config)
    check_metrics(config)
    check_shards(config, images, 1)
    if images % config.batch_size == 1:
        left = f"leaves one of {images} {task.metric.examples} for the last batch"
        check_one_example(config, f"batch-size = {config.batch_size} {left}")
    whole_epochs(config)


def train_centralized(config: Config, run: Run) -> None:
    """Train for ``config.epochs`` (`config` is resolved and checked), from the run's checkpoint if it has one.

    The only worker of LocalSGD takes the same steps, bit for bit, where the batch size divides the training images.
    """
    prepare(config)
    data, task = load_dataset(config), task_of(config)
    model = starting_model(config)
    named = dict(model.named_parameters())
    optimizer = build_optimizer(config, named)
    learner = Learner(model, optimizer, task, config.precision, clip=config.clip_grad_norm)
    run_steps = make_step_fn(config, learner, data.train, len(data.train))
    images = shard(len(data.train), 1, 0, config.seed)
    steps_per_epoch = -(-len(images) // config.batch_size)
    epochs, last = whole_epochs(config)
    lr = schedule_of(config, Fraction(steps_per_epoch), epochs)

    done = 0
    if checkpoint := run.resume(epochs, {"model": model.state_dict(), "optimizer": zero_state(config, named)}):
        model.load_state_dict(checkpoint["model"])
        load_optimizer_state(named, optimizer, checkpoint["optimizer"])
        done = checkpoint["round"]

    for epoch in range(done, last):
        order = sample_order(len(images), epoch * len(images), len(images), config.seed, 0, "epoch")
        first_step = epoch * steps_per_epoch
        rates = [lr(step) for step in range(first_step, first_step + steps_per_epoch)]
        loss = float(run_steps(step_inputs(config, 0, first_step, rates, data.train, images[order])))

        if not math.isfinite(loss):
            raise RunFailed(f"the training loss of epoch {epoch + 1} is {loss}: a lower --lr may help")
        tested = (epoch + 1) % config.evaluate_every == 0 or epoch + 1 == epochs
        tests = evaluate(task, model, data.test, config.precision, metrics_by_name(config)) if tested else {}
        steps = first_step + steps_per_epoch
        trained = {"round": epoch + 1, "epoch": float(epoch + 1), "steps_done": steps, "lr": lr(steps - 1)}
        run.log_row({**trained, **NO_COMMUNICATION, "train_loss": loss, **run.metrics_of(tests)})
        if (epoch + 1) % config.checkpoint_every == 0 or epoch + 1 == last:
            state = {"model": model.state_dict(), "optimizer": optimizer_state(named, optimizer)}
            run.save_checkpoint({"round": epoch + 1, **state})

    run.save_model(model.state_dict())
    run.write_summary(last == epochs, sum(p.numel() for p in model.parameters()), config.device)


def whole_epochs(config: Config) -> tuple[int, int]:
    """The epochs to run in all, and the one to stop after for now; a part of an epoch fails."""
    for name, epochs in (("epochs", config.epochs), ("stop-after-epochs", config.stop_after_epochs)):
        if not epochs.is_integer():
            raise UserError(f"{name} = {epochs}: centralized training runs whole epochs, give a whole number")
    return int(config.epochs), int(min(config.epochs, config.stop_after_epochs or config.epochs))
