"""The server: rounds of LocalSGD, each averaged by the strategy, tested, recorded and saved."""

from __future__ import annotations

import functools
import logging
import shutil
from functools import partial

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import nn

from fedsim.config import Config
from fedsim.data.client_shares import client_shares
from fedsim.data.datasets import load_dataset, task_of
from fedsim.data.local_folder import check_of_run
from fedsim.data.partition import check_partition, images_left_out
from fedsim.data.task import Examples
from fedsim.device import prepare, resolve
from fedsim.errors import RunFailed, RunInProgress, UserError
from fedsim.federation.checkpoint import collect_memories, save
from fedsim.federation.checks import check_strategy
from fedsim.federation.decisions import planned
from fedsim.federation.lengthen import open_run
from fedsim.federation.messenger import Messenger
from fedsim.federation.node_registry import NodeRegistry
from fedsim.federation.recovery import Recovery
from fedsim.federation.round import (
    Progress,
    TooFewClients,
    initial_progress,
    recorded,
    row_of,
    train_round,
)
from fedsim.federation.strategy import build_strategy
from fedsim.models import check_model, starting_model
from fedsim.runs.folder import TESTED_MODEL, config_of_run, run_folder
from fedsim.runs.records import read_rows
from fedsim.runs.run import Run
from fedsim.runs.shown import print_row
from fedsim.training.batchnorm import calibration_sample, reestimate
from fedsim.training.client_tests import spreads
from fedsim.training.failures import failing_in_one_line
from fedsim.training.methods import fewest_updates, layers_of
from fedsim.training.metrics import check_metrics, metrics_by_name
from fedsim.training.run_plan import RunPlan, run_plan
from fedsim.training.step import evaluate
from strategies.layers import Layers
from strategies.sections import split
from strategies.tensor_array import tensors_of

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run LocalSGD as the run-config says."""
    log_errors_in_one_line()
    config = resolve(config_of_run(Config().changed(dict(context.run_config))), "localsgd")
    with failing_in_one_line(config):
        serve(config, grid)


def serve(config: Config, grid: Grid) -> None:
    """Start or resume the run of `config` (resolved)."""
    check_localsgd(config)
    is_new = not run_folder(config, "localsgd").exists()
    run = open_run(config, "localsgd", print_row, "flower")
    print(f"run folder: {run.folder}", flush=True)
    if run.finished:
        raise UserError(f"name = {run.folder.name}: the run in {run.folder} is finished: give another --name")
    try:
        with run.lock():
            train_localsgd(grid, config, run)
    except UserError as error:
        if is_new and not read_rows(run.folder) and not isinstance(error, RunInProgress):  # nothing was trained
            shutil.rmtree(run.folder)
        raise


def check_localsgd(config: Config) -> None:
    """Raise UserError where `config` (resolved) cannot be trained: its data, model or keys do not fit."""
    check_of_run(config)
    load_dataset(config)
    task_of(config).check(config)
    check_model(config)
    check_metrics(config)
    check_partition(config)
    planned(config)
    check_strategy(config)


def train_localsgd(grid: Grid, config: Config, run: Run) -> None:
    """Train the rounds of `config` (resolved and checked) that follow the run's checkpoint, if it has one."""
    prepare(config)
    data, task = load_dataset(config), task_of(config)
    if left_out := images_left_out(config):
        print(left_out, flush=True)
    model = starting_model(config)
    initial = initial_progress(config, model)
    messenger = Messenger(grid)
    registry = NodeRegistry(messenger, config, run.own_data)
    strategy_of = functools.lru_cache(maxsize=1)(partial(build_strategy, config, model=model, images=registry.images))
    registry.wait_for(config.min_clients or config.clients)
    most_rounds = run_plan(config, initial.decided).most_rounds
    recovery = Recovery(run, messenger, registry, initial, most_rounds, fewest_updates(config))
    progress = recovery.resume()

    while progress.round < (plan := run_plan(config, progress.decided)).last_round:
        strategy = strategy_of(plan)
        saves = is_saved(config, plan, progress.round + 1) or recovery.saves_next(progress)

        # Train a round
        try:
            progress, sent, seen = train_round(messenger, config, strategy, registry, progress, with_memories=saves)
            memories = collect_memories(messenger, config, registry.nodes, progress, sent, model) if saves else {}
        except TooFewClients as failure:
            progress = recovery.after(failure, progress)
            continue
        recovery.trained(progress)

        # Evaluate and record
        if progress.round == plan.rounds or plan.completes(progress.round, 1):
            tests: dict[str, float] = {}
            if plan.is_tested(progress.round):
                as_tested = loaded(config, model, progress, data.train, strategy.layers)
                shares = client_shares(config) if plan.tests_clients(progress.round) else None
                tests = evaluate(task, as_tested, data.test, config.precision, metrics_by_name(config), shares)
            row = row_of(plan, progress, messenger) | seen | run.metrics_of(tests)
            run.log_row(row | spreads(task.metric, row))
            progress = recorded(progress)

        # Save a checkpoint
        if saves:
            save(run, config, messenger, progress, memories)
            recovery.saved(progress)

    run.save_model(loaded(config, model, progress, data.train).state_dict())
    if config.test_model != "none":
        run.save_model(loaded(config, model, progress, data.train, strategy_of(plan).layers).state_dict(), TESTED_MODEL)
    run.write_summary(plan.last_round == plan.rounds, sum(p.numel() for p in model.parameters()), config.device)


def is_saved(config: Config, plan: RunPlan, round_: int) -> bool:
    """Whether a checkpoint is made after a round."""
    return plan.completes(round_, config.checkpoint_every) or round_ == plan.last_round


def loaded(
    config: Config, model: nn.Module, progress: Progress, examples: Examples, layers: Layers | None = None
) -> nn.Module:
    """`model` with the global weights of `progress` or, with `layers`, what these test in their place.

    Its buffers are the global ones, or statistics re-estimated on training `examples`.
    """
    parameters, buffers, _ = split(tensors_of(progress.arrays))
    if layers:
        parameters = layers.model_for_test(parameters, progress.state)
    model.load_state_dict({**parameters, **buffers})
    if count := layers_of(config).reestimates_on:
        drawn = calibration_sample(config, examples, count)
        reestimate(task_of(config), model, examples, drawn, config.precision)
    return model


class OneLine(logging.Filter):
    """Reduce a log record of a `UserError` or `RunFailed`, which Flower logs with its traceback, to its message."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, UserError | RunFailed):
            record.msg, record.args, record.exc_info = f"error: {error}", (), None
        return True


def log_errors_in_one_line() -> None:
    """Let Flower's logger in this process use `OneLine`."""
    logger = logging.getLogger("flwr")
    if not any(isinstance(each, OneLine) for each in logger.filters):
        logger.addFilter(OneLine())
