from __future__ import annotations

import pickle
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fedsim.config import FIELDS, Config, own_keys, typed
from fedsim.config.types import MAX_THREADS
from fedsim.errors import UserError
from strategies.compression import Int8

ROOT = Path(__file__).parents[1]


def test_flower_run_config_has_every_key_with_its_default() -> None:
    app = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert app["config"] == Config().as_keys()
    assert {name: type(value) for name, value in app["config"].items()} == {
        name: type(value) for name, value in Config().as_keys().items()
    }


def test_every_key_explains_itself() -> None:
    assert all(field.description for field in FIELDS.values())


def test_values_are_read_from_text_and_from_toml() -> None:
    config = Config().changed({"lr": "0.5", "clients": "12", "optimizer.nesterov": "true", "epochs": 3})
    assert (config.lr, config.clients, config.optimizer, config.epochs) == (0.5, 12, "sgdm:nesterov=true", 3.0)
    assert type(config.epochs) is float


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"local-step": 3}, "unknown key local-step: did you mean local-steps?"),
        ({"local_steps": 3}, "unknown key local_steps: did you mean local-steps?"),
        ({"zzzzzz": 3}, "unknown key zzzzzz: see --help for the keys"),
        ({"a\nb": 3}, r"unknown key a\nb: see --help for the keys"),
        ({"lr": 0.0}, "lr = 0.0 is out of range: it must be greater than 0"),
        ({"lr": float("nan")}, "lr = nan is out of range: it must be finite and greater than 0"),
        ({"lr": float("inf")}, "lr = inf is out of range: it must be finite and greater than 0"),
        ({"lr": 10**400}, "lr = inf is out of range: it must be finite and greater than 0"),
        ({"lr": "9" * 400}, "lr = inf is out of range: it must be finite and greater than 0"),
        ({"lr": "9" * 5000}, "lr = inf is out of range"),
        ({"lr": "nan"}, "lr = 'nan' is not a number"),
        ({"lr": "inf"}, "lr = 'inf' is not a number"),
        ({"lr": "1_000"}, "lr = '1_000' is not a number"),
        ({"lr": "fast"}, "lr = 'fast' is not a number"),
        ({"lr": ""}, "lr = '' is not a number"),
        ({"lr": True}, "lr = True is not a number"),
        ({"lr": [1.0]}, "lr = [1.0] is not a number"),
        ({"clients": "2.5"}, "clients = 2.5 is not a whole number"),
        ({"clients": 2.0}, "clients = 2.0 is not a whole number"),
        ({"clients": "1_000"}, "clients = '1_000' is not a whole number"),
        ({"clients": "\u0664"}, "is not a whole number"),  # a four, but not one of ASCII
        ({"clients": True}, "clients = True is not a whole number"),
        ({"clients": 0}, "clients = 0 is out of range: it must be at least 1"),
        ({"clients": "9" * 400}, "... is out of range: it must be at least 1 and at most 1,000,000,000"),
        ({"clients": 10**5000}, "clients = a number of thousands of digits is out of range"),
        ({"threads": 100_000}, f"threads = 100000 is out of range: it must be at least 0 and at most {MAX_THREADS:,}"),
        (
            {"optimizer.nesterov": "maybe"},
            "optimizer = sgdm:nesterov=maybe: sgdm: nesterov = maybe must be true or false",
        ),
        ({"optimizer": "sgdm:nesterov=1"}, "optimizer = sgdm:nesterov=1: sgdm: nesterov = 1 must be true or false"),
        ({"momentum": 1.0}, "momentum = 1.0 is out of range: it must be at least 0 and less than 1"),
        ({"fraction": "0"}, "fraction = 0 is out of range: it must be greater than 0 and at most 1"),
        ({"optimizer": "lasr"}, "(did you mean lars?)"),
        ({"optimizer": 3}, "optimizer = 3 is not text"),
        ({"model": "resnet"}, "model = resnet is unknown: it must be one of lenet-bn, lenet5"),
        (
            {"partition": "dirichlet:0.3"},
            "dirichlet: 0.3 has no value: give dirichlet:0.3=...",
        ),
        (
            {"partition": "dirichlet:alpha"},
            "dirichlet: alpha has no value: give dirichlet:alpha=...",
        ),
        ({"dataset": "cifar1000"}, "(did you mean cifar100?)"),
        ({"outer": "fedavg"}, "outer = fedavg is unknown: it must be one of none, fedavgm"),
        ({"device": "gpu"}, "device = 'gpu' is out of range: it must be auto, cpu, cuda or cuda:N"),
        ({"device": "mps"}, "device = 'mps' is out of range: it must be auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:\u00b2"}, "is out of range: it must be auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:-1"}, "is out of range: it must be auto, cpu, cuda or cuda:N"),
        ({"schedule": "multistep:milestones=nan"}, "milestones = nan must be one or several numbers with a / between"),
        ({"optimizer": "lamb:nesterov=true"}, "lamb has no argument nesterov: it must be one of betas"),
        ({"optimizer.trust": 1.0}, "optimizer.trust = 1.0: sgdm has no argument trust"),
        ({"lr.x": 1.0}, "lr.x: lr has no arguments: give lr itself"),
        ({"workers": {"speed": [0.5, 1]}}, "has no name: give a dict with it and the arguments"),
        ({"name": "a/b"}, "name = 'a/b' is not a plain folder name"),
        ({"name": ".."}, "name = '..' is not a plain folder name"),
        ({"name": "a" * 256}, "has a name of more than 255 bytes"),
        ({"name": "\u00e9" * 128}, "has a name of more than 255 bytes"),
        ({"name": "a\nb"}, r"name = 'a\nb' holds a control character"),
        ({"name": "\x1b[2J"}, r"name = '\x1b[2J' holds a control character"),
        ({"name": "\udcff"}, r"name = '\udcff' holds a control character, a line break or a byte that is not UTF-8"),
        ({"results-dir": "a\0b"}, r"results-dir = 'a\x00b' holds a control character"),
        ({"results-dir": ""}, "results-dir = '' is empty: give a folder"),
        ({"results-dir": "~nosuchuser/x"}, "begins with another user's home folder: give the whole path"),
        ({"data-dir": "~nosuchuser"}, "begins with another user's home folder: give the whole path"),
        ({"data-dir": f"a/{'b' * 256}"}, "has a name of more than 255 bytes"),
        ({"data-dir": 3}, "data-dir = 3 is not text"),
    ],
)
def test_bad_input_names_the_key_and_the_remedy(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Config().changed(keys)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_chain_may_be_a_list() -> None:
    chain = Config().changed({"compress": [{"name": "topk", "ratio": 0.1}, Int8()], "augment": ("mirror",)})
    assert (chain.compress, chain.augment) == ("topk:ratio=0.1+int8", "mirror")
    for key, value in (("compress", []), ("compress", [3]), ("outer", ["slowmo"])):
        with pytest.raises(UserError, match="is not text"):
            Config().changed({key: value})


def test_values_at_the_ends_of_their_ranges_are_accepted() -> None:
    keys = {
        "threads": MAX_THREADS,
        "seed": 10**18,
        "fraction": "1",
        "momentum": 0,
        "name": "a" * 255,
        "data-dir": "~/x",
    }
    assert Config().changed(keys).fraction == 1.0


def test_identity_holds_what_shapes_the_result_and_nothing_else() -> None:
    identity = Config().identity("centralized")
    assert {"lr", "epochs", "seed", "threads"} <= identity.keys()
    assert not {"clients", "local-steps", "data-dir", "results-dir", "name", "stop-after-epochs"} & identity.keys()
    assert {"clients", "local-steps", "shuffle-every"} <= Config().identity("localsgd").keys()


def test_a_configuration_is_a_value() -> None:
    config = Config(lr=0.5)
    with pytest.raises(ValidationError):
        config.lr = 1.0  # type: ignore[misc]
    other = Config().changed({"lr": "0.5"})
    assert (config, hash(config)) == (other, hash(other))
    assert config != Config()
    assert pickle.loads(pickle.dumps(config)) == config


def test_typed_reads_one_key_alone() -> None:
    assert typed("schedule", "multistep") == "multistep"  # though it needs milestones beside it
    assert typed("epochs", "3") == 3.0
    with pytest.raises(UserError, match="clients = 'two' is not a whole number"):
        typed("clients", "two")
    with pytest.raises(UserError, match="unknown key client: did you mean clients"):
        typed("client", 2)


def test_a_node_may_set_its_own_keys_only() -> None:
    assert own_keys({"data-dir": "d", "partition-id": 1}) == {"data-dir": "d"}
    with pytest.raises(UserError, match="lr cannot stand in the node config"):
        own_keys({"lr": 0.1})
