"""Execute one run, in either mode, by any engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsim.config import Config, Engine, Mode
from fedsim.data.folder import absolute_data_dir
from fedsim.device import resolve
from fedsim.experiments.study import configure
from fedsim.federation.client_app import app as client_app
from fedsim.federation.flwr_run import check_tools, run_with_flwr
from fedsim.federation.in_process import InProcessGrid, stacked_trainers
from fedsim.federation.lengthen import open_run
from fedsim.federation.resources import check_memory
from fedsim.federation.server_app import check_localsgd, train_localsgd
from fedsim.models import check_model
from fedsim.runs.folder import config_of_run, run_folder
from fedsim.runs.run import OnRow, Run
from fedsim.training.centralized import check_centralized, train_centralized
from fedsim.training.failures import failing_in_one_line
from fedsim.training.stacked import check_stackable, why_not


def configured_run(
    mode: Mode, keys: Mapping[str, Any], preset: str = "", engine: Engine = "local"
) -> tuple[Config, Engine]:
    """The configuration and the engine of the run that `keys` (kebab-case), over those of `preset`, ask for."""
    return resolve_run(config_of_run(configure(mode, keys, preset)), mode, engine)


def resolve_run(config: Config, mode: Mode, engine: Engine, here: bool = True) -> tuple[Config, Engine]:
    """`config` with its actual device and threads, and the engine that trains its clients.

    On a GPU, where clients would take turns, ``local`` stacks them if they can be stacked. Raises UserError where the
    model cannot be trained at all.
    """
    resolved = resolve(config, mode, here)
    takes_turns = engine == "local" and resolved.device.startswith("cuda") and resolved.clients_per_round > 1
    if mode == "localsgd" and takes_turns:
        with failing_in_one_line(resolved):
            check_model(resolved)
            engine = "local" if why_not(resolved) else "stacked"
    return resolved, engine


def execute(
    config: Config,
    mode: Mode,
    engine: Engine = "local",
    on_row: OnRow | None = None,
    rerun: bool = False,
    patience: float = 0.0,
) -> Run:
    """Run `config` to its end or early stop: resume it if it was interrupted, skip it if it is finished.

    `config` and `engine` are those of `resolve_run`. `on_row` is called with each row; the engine flower streams its
    log instead. `rerun` starts over. If another process runs it, this waits up to `patience` seconds and then raises
    RunInProgress. Input is checked before anything is written.
    """
    check(config, mode, engine)
    return execute_checked(config, mode, engine, on_row, rerun, patience)


def execute_checked(
    config: Config, mode: Mode, engine: Engine, on_row: OnRow | None, rerun: bool, patience: float = 0.0
) -> Run:
    """`execute` for a run that `check` has accepted."""
    in_process = mode == "localsgd" and engine != "flower"
    is_new = rerun or not run_folder(config, mode).exists()
    with failing_in_one_line(config):
        if in_process and is_new:
            check_memory(config)
        run = open_run(config, mode, on_row, "" if mode == "centralized" else engine)
        if not rerun and is_done(run):  # nothing is written: the disk may be read-only
            return run
        with run.lock(patience):
            if rerun:
                run.reset()
            if is_done(run):
                return run
            if engine == "flower":  # which resumes it in another process
                run.check_inputs()
            if mode == "centralized":
                train_centralized(config, run)
                return run
            if in_process:
                if not is_new:  # a finished one needs none
                    check_memory(config)
                trainers = stacked_trainers(config) if engine == "stacked" else []
                with InProcessGrid(client_app, config, trainers) as grid:
                    train_localsgd(grid, config, run)
                return run
    # The server app locks the run itself, and works in another folder
    paths = {"results-dir": str(run.folder.parent), "data-dir": absolute_data_dir(config)}
    run_with_flwr(config.changed({"name": run.folder.name, **paths}))
    return run


def is_done(run: Run) -> bool:
    """Whether a run is finished; raises UserError if it is, but its inputs or its files have changed since."""
    if run.finished:
        run.check_inputs()
        run.check_outputs()
        return True
    return False


def check(config: Config, mode: Mode, engine: Engine) -> None:
    """Raise UserError if a run of `config` (resolved) by `engine` cannot begin: its data, model or keys do not fit."""
    with failing_in_one_line(config):
        if mode == "centralized":
            check_centralized(config)
        else:
            check_localsgd(config)
            if engine == "stacked" and config.clients_per_round > 1:
                check_stackable(config)
            if engine == "flower":
                check_tools()
