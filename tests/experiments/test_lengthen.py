"""A longer run continues from the end of a shorter one, if nothing so far depends on the length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from fedsim.config import Config, Mode
from fedsim.device import resolve
from fedsim.errors import UserError
from fedsim.experiments.execute import execute
from fedsim.federation import client_app, server_app
from fedsim.federation.in_process import InProcessGrid
from fedsim.federation.lengthen import open_run
from fedsim.runs.folder import config_of_run
from fedsim.runs.records import read_summary
from tests.conftest import Execute, assert_same_bits, final_model, rows_of


def as_server_app(config: Config) -> None:
    """Run `config` as Flower runs the server app, but with the clients in this process."""
    with InProcessGrid(client_app.app, config) as grid:
        server_app.main(grid, Context(1, 1, {}, RecordDict(), dict(config.as_keys())))


@pytest.mark.parametrize(
    ("mode", "keys", "shorter", "longer"),
    [
        ("localsgd", {"schedule": "multistep:milestones=1"}, {"epochs": 1.0}, {"epochs": 2.0}),
        ("localsgd", {"evaluate-every": 3, "momentum-at-sync": "average"}, {"rounds": 3}, {"rounds": 7}),
        ("centralized", {"warmup-epochs": 1.0}, {"epochs": 1.0}, {"epochs": 2.0}),
    ],
)
def test_a_lengthened_run_is_the_longer_run_bitwise(
    run: Execute, mode: Mode, keys: dict[str, Any], shorter: dict[str, Any], longer: dict[str, Any]
) -> None:
    whole = run(mode, name="whole", **keys, **longer)
    assert run(mode, name="part", **keys, **shorter).finished
    part = run(mode, name="part", **keys, **longer)
    assert_same_bits(final_model(part), final_model(whole))
    assert rows_of(part) == rows_of(whole)
    assert part.finished
    assert (part.folder / "config.json").read_bytes() == (whole.folder / "config.json").read_bytes()


def test_a_lengthened_run_that_is_stopped_resumes(run: Execute) -> None:
    whole = run(name="whole", rounds=6)
    run(name="part", rounds=2)
    assert not run(name="part", rounds=6, stop_after_rounds=3).finished
    assert_same_bits(final_model(run(name="part", rounds=6)), final_model(whole))


@pytest.mark.parametrize(
    ("mode", "keys", "shorter", "other", "words"),
    [
        (
            "localsgd",
            {},
            {"rounds": 3},
            {"rounds": 2},
            "holds a run of 3 rounds: it can be lengthened, but not shorten",
        ),
        (
            "localsgd",
            {},
            {"rounds": 3},
            {"rounds": 3, "epochs": 9.0},
            "holds a run of 3 rounds: it already has this length: give epochs = 2.0 and rounds = 3, or another --name",
        ),
        ("centralized", {}, {"epochs": 2.0}, {"epochs": 1.0}, "holds a run of 2 epochs: it can be lengthened, but not"),
        (
            "localsgd",
            {"schedule": "cosine"},
            {"rounds": 2},
            {"rounds": 3},
            "with schedule = cosine its rates depend on",
        ),
        (
            "localsgd",
            {"local-steps-schedule": "linear:max=4", "record-by": "epoch"},
            {"epochs": 1.0},
            {"epochs": 2.0},
            "J of its rounds depends on its length (linear:max=4): give another --name",
        ),
        (
            "localsgd",
            {},
            {"rounds": 2},
            {"rounds": 3, "epochs": 9.0, "lr": 0.5},
            "holds a run of another configuration (lr = 0.01, not",
        ),
    ],
)
def test_what_cannot_be_lengthened_is_one_line_and_stays(
    run: Execute, mode: Mode, keys: dict[str, Any], shorter: dict[str, Any], other: dict[str, Any], words: str
) -> None:
    folder = run(mode, name="part", **keys, **shorter).folder
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError) as caught:
        run(mode, name="part", **keys, **other)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("of", ["damaged", "missing"])
@pytest.mark.parametrize("by", ["this process", "the server app"])
def test_a_finished_run_without_a_checkpoint_stays_as_it_is(run: Execute, small: Config, of: str, by: str) -> None:
    folder = run(name="part", rounds=2, checkpoint_every=1).folder
    for name in ("checkpoint.pt", "checkpoint-before.pt"):
        (folder / name).unlink()
        if of == "damaged":
            (folder / name).write_bytes(b"half of one")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    longer = resolve(small.changed({"name": "part", "rounds": 3}), "localsgd")
    with pytest.raises(UserError, match=r"no (other )?checkpoint to resume from: .*give --rerun"):
        execute(longer, "localsgd") if by == "this process" else as_server_app(longer)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_server_app_lengthens_a_run_and_keeps_the_summary_until_the_next(run: Execute, small: Config) -> None:
    whole = run(name="whole", rounds=4)
    run(name="part", rounds=2)
    longer = resolve(small.changed({"name": "part", "rounds": 4}), "localsgd")
    as_server_app(longer.changed({"stop-after-rounds": 2}))
    folder = Path(small.results_dir) / "part"
    summary = read_summary(folder) or {}
    assert (summary["round"], summary["finished"]) == (2, False)
    as_server_app(longer)
    assert_same_bits(final_model(folder), final_model(whole))
    assert rows_of(folder) == rows_of(whole)


def test_another_engine_does_not_lengthen(run: Execute, small: Config) -> None:
    folder = run(name="part", rounds=2).folder
    before = {path: path.read_bytes() for path in folder.iterdir()}
    longer = resolve(small.changed({"name": "part", "rounds": 3}), "localsgd")
    with pytest.raises(UserError, match="it was trained by another engine: give --engine local, or another --name"):
        execute(longer, "localsgd", "stacked")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_study_looks_into_a_folder_whatever_engine_has_trained_it(small: Config) -> None:
    config = resolve(small.changed({"name": "part", "rounds": 2}), "localsgd")
    execute(config, "localsgd", "stacked")
    assert not open_run(config.changed({"rounds": 3}), "localsgd").finished


def test_resume_takes_a_new_length(run: Execute, small: Config, tmp_path: Path) -> None:
    run(name="part", rounds=2)
    longer = config_of_run(Config().changed({"resume": "part", "rounds": 5, "results-dir": str(tmp_path)}))
    assert (longer.rounds, longer.name, longer.batch_size) == (5, "part", small.batch_size)
