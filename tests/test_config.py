from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedsim.config import FIELDS, Config
from fedsim.errors import UserError

ROOT = Path(__file__).parents[1]


def test_flower_run_config_has_every_key_with_its_default() -> None:
    app = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert app["config"] == Config().as_keys()
    assert {name: type(value) for name, value in app["config"].items()} == {
        name: type(value) for name, value in Config().as_keys().items()
    }


def test_every_key_explains_itself() -> None:
    assert all(item.metadata["help"] for item in FIELDS.values())


def test_values_are_read_from_text_and_from_toml() -> None:
    config = Config().changed({"lr": "0.5", "clients": "12", "nesterov": "true", "epochs": 3})
    assert (config.lr, config.clients, config.nesterov, config.epochs) == (0.5, 12, True, 3.0)
    assert type(config.epochs) is float


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"local-step": 3}, "unknown key local-step: did you mean local-steps?"),
        ({"local_steps": 3}, "unknown key local_steps: did you mean local-steps?"),
        ({"zzzzzz": 3}, "unknown key zzzzzz: see --help for the keys"),
        ({"lr": 0.0}, "lr = 0.0 is out of range: it must be a number greater than 0"),
        ({"lr": "nan"}, "lr = nan is out of range: it must be a number greater than 0"),
        ({"lr": "inf"}, "lr = inf is out of range: it must be a number greater than 0"),
        ({"lr": "fast"}, "lr = 'fast' is not a number"),
        ({"clients": "2.5"}, "clients = '2.5' is not a whole number"),
        ({"clients": 2.5}, "clients = 2.5 is not a whole number"),
        ({"clients": True}, "clients = True is not a whole number"),
        ({"clients": 0}, "clients = 0 is out of range: it must be a whole number of at least 1"),
        ({"nesterov": "maybe"}, "nesterov = 'maybe' is not true or false"),
        ({"momentum": 1.0}, "momentum = 1.0 is out of range: it must be at least 0 and less than 1"),
        ({"optimizer": "lasr"}, "it must be one of sgdm, lars, lamb (did you mean lars?)"),
        ({"model": "resnet"}, "model = 'resnet' is out of range: it must be one of lenet-bn, lenet5"),
        ({"dataset": "cifar10"}, "(did you mean cifar100?)"),
        ({"strategy": "fedavg"}, "strategy = 'fedavg' is out of range: it must be one of localsgd"),
        ({"device": "gpu"}, "device = 'gpu' is out of range: it must be auto, cpu, cuda, cuda:N or mps"),
        ({"milestones": "60,50"}, "milestones = '60,50' is out of range: it must be ascending epochs"),
        ({"schedule": "multistep"}, "milestones is empty"),
        ({"nesterov": True, "optimizer": "lamb"}, "nesterov = true needs optimizer sgdm or lars"),
        (
            {"optimizer-backend": "torch-optimizer", "lamb-clamp": 0.0},
            "lamb-clamp is not known to torch-optimizer: give --optimizer-backend fedsim",
        ),
        ({"name": "a/b"}, "name = 'a/b' is no plain folder name"),
        ({"name": ".."}, "name = '..' is no plain folder name"),
    ],
)
def test_bad_input_names_the_key_and_the_remedy(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Config().changed(keys)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_identity_holds_what_shapes_the_result_and_nothing_else() -> None:
    identity = Config().identity("centralized")
    assert {"lr", "epochs", "seed", "threads"} <= identity.keys()
    assert not {"clients", "local-steps", "data-dir", "results-dir", "name", "stop-after-epochs"} & identity.keys()
    assert {"clients", "local-steps", "reshuffle"} <= Config().identity("localsgd").keys()


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().lr = 1.0  # type: ignore[misc]
