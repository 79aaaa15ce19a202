"""A longer run continues from the end of a shorter one, if nothing so far depends on the length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsim.config import Config, Mode
from fedsim.device import resolve
from fedsim.errors import UserError
from fedsim.experiments.execute import execute
from fedsim.experiments.lengthen import open_run
from fedsim.records import config_of_run
from tests.conftest import Execute, assert_same_bits, final_model, rows_of


@pytest.mark.parametrize(
    ("mode", "keys", "shorter", "longer"),
    [
        ("localsgd", {"schedule": "multistep", "milestones": "1"}, {"epochs": 1.0}, {"epochs": 2.0}),
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
            {"local-steps-schedule": "linear", "local-steps-max": 4, "record-by": "epoch"},
            {"epochs": 1.0},
            {"epochs": 2.0},
            "J of its rounds depends on its length (linear): give another --name",
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


def test_another_engine_does_not_lengthen(run: Execute, small: Config) -> None:
    folder = run(name="part", rounds=2).folder
    before = {path: path.read_bytes() for path in folder.iterdir()}
    longer = resolve(small.changed({"name": "part", "rounds": 3}), "localsgd")
    with pytest.raises(UserError, match="its engine was threads: give --engine threads, or another --name"):
        execute(longer, "localsgd", "stacked")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_study_looks_into_a_folder_whatever_engine_has_trained_it(small: Config) -> None:
    config = resolve(small.changed({"name": "part", "rounds": 2}), "localsgd")
    execute(config, "localsgd", "stacked")
    assert open_run(config.changed({"rounds": 3}), "localsgd").rows == []


def test_resume_takes_a_new_length(run: Execute, small: Config, tmp_path: Path) -> None:
    run(name="part", rounds=2)
    longer = config_of_run(Config().changed({"resume": "part", "rounds": 5, "results-dir": str(tmp_path)}))
    assert (longer.rounds, longer.name, longer.batch_size) == (5, "part", small.batch_size)
