"""The server: rounds of LocalSGD, each averaged by the strategy, tested, recorded and saved."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, fields

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from torch import nn

from fedsim.config import Config
from fedsim.data import check_shards, load_dataset
from fedsim.engine import evaluate
from fedsim.errors import RunFailed, UserError
from fedsim.machine import prepare, resolve
from fedsim.models import build_model
from fedsim.nodes import Nodes, collect_states, payload, restore_states, roll_call
from fedsim.optim import zero_state
from fedsim.records import Row, Run
from fedsim.show import print_row
from fedsim.sync import Plan, completes, join, plan, split
from strategies import STRATEGIES, LocalSGD, tensor_record, tensors_of

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run LocalSGD as the run-config says."""
    config = resolve(Config().changed(dict(context.run_config)), "localsgd")
    run = Run(config, "localsgd", show=print_row)
    print(f"run folder: {run.folder}", flush=True)
    if run.finished:
        raise UserError(f"name = {run.folder.name}: the run in {run.folder} is finished: give another --name")
    with run.held():
        train_localsgd(grid, config, run)


@dataclass
class Progress:
    """How far a run has come."""

    round: int
    arrays: ArrayRecord
    bytes_up: int = 0
    bytes_down: int = 0
    losses: list[float] = field(default_factory=list)  # of each round since the last row
    left_out: dict[str, str] = field(default_factory=dict)  # since the last row


def train_localsgd(grid: Grid, config: Config, run: Run) -> None:
    """The rounds of `config` (resolved), from the run's checkpoint on if it has one."""
    prepare(config)
    data = load_dataset(config)
    check_shards(config, len(data.train), config.clients)
    planned = plan(config, len(data.train))
    nodes = roll_call(grid, config.clients)
    strategy = STRATEGIES[config.strategy](
        workers=nodes,
        batchnorm_at_sync=config.batchnorm_at_sync,
        seed=config.seed,
        fraction_train=config.fraction,
    )
    model = build_model(config.model, data.classes, config.seed, config.device, config.precision)
    progress = begin(grid, config, run, nodes, model)

    for round in range(progress.round + 1, planned.last_round + 1):
        train_round(grid, strategy, progress)

        if completes(config, planned, round, 1) or round == planned.rounds:
            test_loss, test_accuracy = None, None
            if completes(config, planned, round, config.evaluate_every) or round == planned.rounds:
                test_loss, test_accuracy = evaluate(loaded(model, progress), data.test, config.precision)
            run.add(row_of(config, planned, progress) | {"test_loss": test_loss, "test_accuracy": test_accuracy})
            progress.losses, progress.left_out = [], {}

        if completes(config, planned, round, config.checkpoint_every) or round == planned.last_round:
            states = collect_states(grid, nodes) if config.momentum_at_sync == "keep" else {}
            run.save_checkpoint({**vars(progress), "arrays": tensors_of(progress.arrays), "clients": states})

    run.save_model(loaded(model, progress).state_dict())
    finished = planned.last_round == planned.rounds
    run.end(finished, sum(p.numel() for p in model.parameters()), config.device)


def begin(grid: Grid, config: Config, run: Run, nodes: Nodes, model: nn.Module) -> Progress:
    """The progress of the run's checkpoint, the workers' states handed back to them; or that of a new run."""
    if checkpoint := run.resume():
        restore_states(grid, nodes, checkpoint["clients"])
        held = {item.name: checkpoint[item.name] for item in fields(Progress)}
        return Progress(**{**held, "arrays": tensor_record(checkpoint["arrays"])})
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    averaged_state = zero_state(config, dict(model.named_parameters())) if config.momentum_at_sync == "average" else {}
    return Progress(0, tensor_record(join(initial, averaged_state)))


def row_of(config: Config, planned: Plan, progress: Progress) -> Row:
    """The row of what has been trained; tests come to it."""
    steps = progress.round * config.local_steps
    return {
        "round": progress.round,
        "epoch": float(steps / planned.lr.steps_per_epoch),
        "local_steps": steps,
        "syncs": progress.round,
        "bytes_up": progress.bytes_up,
        "bytes_down": progress.bytes_down,
        "lr": planned.lr(steps - 1),
        "train_loss": statistics.fmean(progress.losses),
        "left_out": progress.left_out,
    }


def loaded(model: nn.Module, progress: Progress) -> nn.Module:
    """`model` with the global weights that `progress` has come to."""
    model.load_state_dict(split(tensors_of(progress.arrays))[0])
    return model


def train_round(grid: Grid, strategy: LocalSGD, progress: Progress) -> None:
    """One round: `progress` moves on to the averaged arrays and keeps the workers' mean loss."""
    progress.round += 1
    messages = list(strategy.configure_train(progress.round, progress.arrays, ConfigRecord(), grid))
    replies = list(grid.send_and_receive(messages))
    averaged, metrics = strategy.aggregate_train(progress.round, replies)
    progress.bytes_down += payload(messages)
    progress.bytes_up += payload(replies)
    if averaged is None or metrics is None:
        raise RunFailed(f"round {progress.round}: no client sent a usable update ({strategy.left_out})")
    progress.arrays = averaged
    progress.losses.append(float(metrics["train-loss"]))  # type: ignore[arg-type]
    progress.left_out |= {str(worker): reason for worker, reason in strategy.left_out.items()}
