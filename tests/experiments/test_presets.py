from __future__ import annotations

from typing import Any

import pytest

from fedsim.config import Mode
from fedsim.errors import UserError
from fedsim.experiments.study import configure, study_names
from fedsim.training.run_plan import run_plan


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"optimizer": "sgdm", "batch-size": 8192},
            {"lr": 0.01, "lr-scaling": "none", "schedule": "multistep:milestones=50/60"},
        ),
        (
            {"optimizer": "lars", "batch-size": 1024},
            {"optimizer": "lars:trust=0.05", "lr-scaling": "linear:batch=128", "warmup-epochs": 5.0},
        ),
        (
            {"optimizer": "lamb", "batch-size": 1024},
            {"warmup-epochs": 10.0, "decay-biases-and-norms": False},
        ),
        ({"optimizer": "lars:trust=0.1,nesterov=true"}, {"optimizer": "lars:trust=0.1,nesterov=true"}),
        ({"optimizer": "lamb", "batch-size": 2048}, {"lr": 0.02, "schedule": "cosine"}),
    ],
)
def test_table1_fills_in_what_fits_the_optimizer_and_the_batch(given: dict[str, Any], expected: dict[str, Any]) -> None:
    keys = configure("centralized", given, "table1").as_keys()
    assert {**given, **expected}.items() <= keys.items()
    assert {
        "epochs": 100.0,
        "weight-decay": 4e-4,
        "normalize": "cifar10",
        "schedule-unit": "epoch",
    }.items() <= keys.items()


def test_table2_is_200_rounds_whatever_j() -> None:
    for clients, local_steps, epochs in ((4, 10, 10.24), (12, 30, 92.16)):
        config = configure("localsgd", {"clients": clients, "local-steps": local_steps}, "table2")
        planned = run_plan(config)
        assert planned.rounds == 200
        assert float(planned.epoch(200)) == pytest.approx(epochs)
        assert (config.batchnorm_at_sync, config.shuffle_every, config.momentum_at_sync) == (
            "first-worker",
            "round",
            "keep",
        )


def test_explicit_flags_win() -> None:
    config = configure("centralized", {"optimizer": "lamb", "batch-size": 4096, "lr": 0.5, "epochs": 7.0}, "table1")
    assert (config.lr, config.epochs, config.schedule) == (0.5, 7.0, "cosine")


def test_a_budget_in_epochs_replaces_the_presets_rounds() -> None:
    assert configure("localsgd", {"epochs": 2.0}, "table2").rounds == 0
    assert configure("localsgd", {"rounds": 3}, "table2").rounds == 3


def test_equal_epochs_take_the_rounds_that_the_paper_notes_and_a_shorter_last_one() -> None:
    for clients, rounds in ((4, (1954, 977, 652)), (12, (651, 326, 217))):  # of the paper: 1953, 977, 651, ...
        for local_steps, expected in zip((10, 20, 30), rounds, strict=True):
            config = configure("localsgd", {"clients": clients, "local-steps": local_steps, "epochs": 100.0}, "table2")
            assert run_plan(config).rounds == expected


@pytest.mark.parametrize("name", ["table3", "../config", "table1.tml"])
def test_an_unknown_preset_names_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match=r"it must be one of .*kj-equal-epochs, .*table1, .*table2"):
        configure("localsgd", {}, name)


@pytest.mark.parametrize(("mode", "preset"), [("localsgd", "table1"), ("centralized", "table2")])
def test_a_preset_of_the_other_mode_is_refused_with_the_remedy(mode: Mode, preset: str) -> None:
    """Half of its settings would have no effect."""
    other = {"localsgd": "centralized", "centralized": "localsgd"}[mode]
    remedy = f"preset = {preset} is for mode {other}, not {mode}: give it to {other}, or here one of "
    with pytest.raises(UserError) as caught:
        configure(mode, {}, preset)
    words = str(caught.value)
    assert words.startswith(remedy)
    for name in words.removeprefix(remedy).split(", "):
        configure(mode, {}, name)
        assert name in study_names()
