"""The server: rounds of LocalSGD, each averaged by the strategy, tested, recorded and saved."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import fields, replace

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from torch import Tensor, nn

from fedsim.config import Config
from fedsim.data.datasets import load_dataset
from fedsim.data.local_folder import check_of_run
from fedsim.data.partition import check_shards
from fedsim.device import prepare, resolve
from fedsim.errors import RunFailed, UserError
from fedsim.federation.error_log import log_errors_in_one_line
from fedsim.federation.node_registry import Roster, collect_states, restore_states, usable_states
from fedsim.federation.protocol import join, split
from fedsim.federation.round import Progress, TooFewClients, build_strategy, row_of, train_round
from fedsim.models import build_model
from fedsim.optim import zero_state
from fedsim.records import Run, config_of_run, print_row, run_folder
from fedsim.training.run_plan import RunPlan, run_plan
from fedsim.training.step import evaluate
from strategies import tensor_record, tensors_of

app = ServerApp()
TRIES = 3  # a node that comes back is noticed by the second, and what it has lost is mended by the third


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run LocalSGD as the run-config says."""
    log_errors_in_one_line()
    config = resolve(config_of_run(Config().changed(dict(context.run_config))), "localsgd")
    check_of_run(config)
    is_new = not run_folder(config, "localsgd").exists()
    run = Run(config, "localsgd", on_row=print_row)
    print(f"run folder: {run.folder}", flush=True)
    if run.finished:
        raise UserError(f"name = {run.folder.name}: the run in {run.folder} is finished: give another --name")
    try:
        with run.lock():
            train_localsgd(grid, config, run)
    except UserError:
        if is_new and not run.rows:  # nothing was trained
            shutil.rmtree(run.folder)
        raise


def train_localsgd(grid: Grid, config: Config, run: Run) -> None:
    """The rounds of `config` (resolved), from the run's checkpoint on if it has one."""
    prepare(config)
    data = load_dataset(config)
    check_shards(config, len(data.train), config.clients)
    plan = run_plan(config, len(data.train))
    model = build_model(config.model, data.classes, config.seed, config.device, config.precision)
    new = new_progress(config, model)
    roster = Roster(grid, config)
    roster.call(least=config.min_clients or config.clients)
    strategy = build_strategy(config, plan)
    progress = begin(grid, run, roster, new, plan.rounds)

    furthest, failures = progress.round, 0  # failures since a round went further than all before it
    while progress.round < plan.last_round:
        try:
            saves = is_saved(config, plan, progress.round + 1)
            states = train_round(grid, config, strategy, roster, progress, with_states=saves)
            ends = progress.round == plan.rounds

            if completes(config, plan, progress.round, 1) or ends:
                test_loss, test_accuracy = None, None
                if completes(config, plan, progress.round, config.evaluate_every) or ends:
                    test_loss, test_accuracy = evaluate(loaded(model, progress), data.test, config.precision)
                run.log_row(row_of(plan, progress) | {"test_loss": test_loss, "test_accuracy": test_accuracy})
                progress.losses, progress.left_out = [], {}

            if saves:
                save(grid, config, run, roster, progress, model, states)

        except TooFewClients as failure:
            failures += 1
            if failures == TRIES:
                raise RunFailed(f"{failure}; tried {TRIES} times; --resume {run.folder.name} goes on") from failure
            print(f"{failure}; it is tried again", flush=True)
            try:
                roster.call(least=config.min_clients or 1)
            except UserError as error:  # what was right when the run began
                raise RunFailed(str(error)) from error
            if failure.states_lost:  # every client goes back to where the states of all are known
                progress = begin(grid, run, roster, new, plan.rounds)

        if progress.round > furthest:
            furthest, failures = progress.round, 0

    run.save_model(loaded(model, progress).state_dict())
    run.write_summary(plan.last_round == plan.rounds, sum(p.numel() for p in model.parameters()), config.device)


def new_progress(config: Config, model: nn.Module) -> Progress:
    """The progress of a run that begins with the weights of `model`."""
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    averaged_state = zero_state(config, dict(model.named_parameters())) if config.momentum_at_sync == "average" else {}
    return Progress(0, tensor_record(join(initial, averaged_state)), counted=[0] * config.clients)


def begin(grid: Grid, run: Run, roster: Roster, new: Progress, rounds: int) -> Progress:
    """The progress of the run's checkpoint, the workers' states handed back to them; or that of `new`, copied."""
    checkpoint = run.resume(rounds, {**vars(new), "arrays": tensors_of(new.arrays), "clients": {}})
    if checkpoint is None:
        return replace(new, counted=list(new.counted), losses=[], left_out={})
    held = {item.name: checkpoint[item.name] for item in fields(Progress)}
    progress = Progress(**{**held, "arrays": tensor_record(checkpoint["arrays"])})
    restore_states(grid, roster.nodes, progress.counted, checkpoint["clients"])
    return progress


def completes(config: Config, plan: RunPlan, round: int, every: int) -> bool:
    """Whether `round` is the one that completes another `every` rounds, or, where ``record-by`` says so, epochs."""
    return round % every == 0 if config.record_by == "round" else plan.completes_epochs(round, every)


def is_saved(config: Config, plan: RunPlan, round: int) -> bool:
    """Whether a checkpoint is made after `round`."""
    return completes(config, plan, round, config.checkpoint_every) or round == plan.last_round


def save(
    grid: Grid,
    config: Config,
    run: Run,
    roster: Roster,
    progress: Progress,
    model: nn.Module,
    sent: Mapping[int, ArrayRecord],
) -> None:
    """Save all that the run needs to go on; a worker whose state is not to be had would then begin anew.

    `sent` are the states that came along with the round's updates; the other workers are asked for theirs.
    """
    states: dict[int, dict[str, Tensor]] = {}
    counted = progress.counted
    if config.momentum_at_sync == "keep":
        others = {node: worker for node, worker in roster.nodes.items() if worker not in sent}
        like = zero_state(config, dict(model.named_parameters()))
        states = usable_states({**sent, **collect_states(grid, others, counted)}, counted, like)
        counted = [round if worker in states else 0 for worker, round in enumerate(counted)]
        if len(states) < (config.min_clients or 1):
            raise TooFewClients(f"round {progress.round}: only {len(states)} clients keep their state", True)
    arrays = tensors_of(progress.arrays)
    run.save_checkpoint({**vars(progress), "counted": counted, "arrays": arrays, "clients": states})


def loaded(model: nn.Module, progress: Progress) -> nn.Module:
    """`model` with the global weights that `progress` has come to."""
    model.load_state_dict(split(tensors_of(progress.arrays))[0])
    return model
