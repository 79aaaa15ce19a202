"""Any combination of the choices of a run is refused in a line, or trains as promised.

Hypothesis draws keys of all parts: optimizers, local rules, codecs both ways, outer optimizers, robust means, schedules
of J and of the rate, uneven shards, Flower's strategies, both engines of this process. A run that is accepted must

    - resume bit for bit after a cut in its middle,
    - give the same bits with the replies of its clients in any order, and messages that were pickled,
    - count in its rows the bytes of all messages, both ways,
    - be what the reference trains, to 1e-10, where it is in float64 and the reference knows all its parts.

The suite tries the same twenty every time. To try others, in a new draw each time or that of a seed:

    FEDSIM_COMBINATIONS=300 pytest tests/test_combinations.py
    FEDSIM_COMBINATIONS=300 pytest tests/test_combinations.py --hypothesis-seed=7
"""

from __future__ import annotations

import collections
import importlib.util
import os
import random
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from fedsim.config import CORES, FIELDS, Config, Engine, kebab
from fedsim.errors import UserError
from fedsim.experiments.execute import execute, resolve_run
from fedsim.federation.client_app import app as client_app
from fedsim.federation.in_process import stacked_trainers
from fedsim.federation.server_app import train_localsgd
from fedsim.records import Run, read_rows
from fedsim.training.run_plan import run_plan
from tests.conftest import assert_same_bits, final_model, rows_of
from tests.federation.test_compress_down import Counting
from tests.federation.test_messenger import Pickled
from tests.reference_run import covers, reference
from tests.test_fuzz import no_callback_left  # noqa: F401

MANY = int(os.environ.get("FEDSIM_COMBINATIONS", 0))
drawn = settings(
    max_examples=MANY or 20,
    derandomize=not MANY,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)

SMALL: dict[str, Any] = {
    "dataset": "synthetic",
    "synthetic-images": 48,
    "crop-size": 12,
    "crop-padding": 0,
    "model": "tests.own_code:batchnorm",
    "threads": 1,
    "device": "cpu",
    "checkpoint-every": 1,
}


Choice = dict[str, Any]
MODELS: list[Choice] = [{}, {}, {"model": "tests.own_code:narrow"}]
OPTIMIZERS: list[Choice] = [
    {},
    {"momentum": 0.0},
    {"nesterov": True, "decay-biases-and-norms": False},
    {"optimizer": "lars", "trust-coefficient": 0.05, "nesterov": True},
    {
        **{"optimizer": "lars", "trust-coefficient": 0.05, "lars-lr-in-momentum": True},
        **{"lars-adapt-undecayed": True, "decay-biases-and-norms": False},
    },
    {"optimizer": "lars", "trust-coefficient": 0.05, "optimizer-backend": "torch-optimizer"},
    {"optimizer": "lamb", "lamb-bias-correction": "moments", "decay-biases-and-norms": False},
    {"optimizer": "lamb", "lamb-bias-correction": "step-size", "beta1": 0.8, "lamb-clamp": 0.0},
    {"optimizer": "lamb", "optimizer-backend": "torch-optimizer"},
    {"optimizer": "adamw", "optimizer-args": "betas=0.8:0.9", "weight-decay": 0.01},
    {"optimizer": "adam", "optimizer-args": "amsgrad=true, eps=1e-4"},
    {"optimizer": "adafactor"},
    {"optimizer": "adagrad", "optimizer-args": "lr_decay=0.1"},
    {"optimizer": "adadelta", "lr": 1.0},
    {"optimizer": "adamax", "optimizer-args": "eps=1e-4"},  # a smaller one blows rounding errors up
    {"optimizer": "nadam", "optimizer-args": "eps=1e-4"},
    {"optimizer": "radam", "optimizer-args": "eps=1e-4"},
    {"optimizer": "rmsprop", "optimizer-args": "centered=true, momentum=0.5, eps=1e-3"},
    {"optimizer": "sgd", "optimizer-args": "momentum=0.5, nesterov=true"},
]
RULES: list[Choice] = [
    {},
    {},
    {"local-rule": "fedprox", "prox-mu": 0.5},
    {"local-rule": "scaffold"},
    {"local-rule": "feddyn:alpha=0.1"},
    {"local-rule": "fednova", "momentum-at-sync": "reset"},
    {"local-rule": "scaffold-inferred", "momentum": 0.0, "weight-decay": 0.0, "nesterov": False},
]
NOT_WITH = {  # the beginning of a rule -> keys that it is nearly always refused with
    "feddyn": "mean|trim|delay|outer|compress",
    "fednova": "mean|trim|delay|optimizer|nesterov|trust|lars|lamb|beta",
}
MOMENTUM: list[Choice] = [{}, {}, {"momentum-at-sync": "reset"}, {"momentum-at-sync": "average"}]
BATCHNORM: list[Choice] = [
    {},
    {"batchnorm-at-sync": "first-worker"},
    {"batchnorm-at-sync": "pooled"},
    {"batchnorm-at-sync": "local"},
    {"batchnorm-at-sync": "re-estimated", "batchnorm-images": 20},
]
CODECS = ["none", "none", "none", "fp16", "bf16", "int8", "int4", "sign", "topk", "randomk", "qsgd", "powersgd"]
OF_CODEC: dict[str, list[Choice]] = {
    "topk": [{"compress-ratio": 0.1}, {"compress-ratio": 1.0}, {}],
    "randomk": [{"compress-ratio": 0.3}],
    "qsgd": [{}, {"compress-levels": 40}, {"compress-levels": 3}],
    "powersgd": [{"compress-rank": 1}, {"compress-rank": 2}, {}],
}
OUTER: list[Choice] = [
    {},
    {},
    {},
    {"outer": "fedavgm"},
    {"outer": "slowmo", "outer-args": "momentum=0.6"},
    {"outer": "diloco"},
    {"outer": "fedadam", "outer-args": "lr=0.01, eps=0.01, bias_correction=true"},
    {"outer": "fedyogi", "outer-args": "betas=0.5:0.9"},
    {"outer": "fedadagrad"},
    {"outer": "sgd", "outer-args": "lr=0.5, momentum=0.5"},
]
MEANS: list[Choice] = [
    *[{}] * 6,
    {"mean": "trimmed", "trim": 0.4},
    {"mean": "trimmed"},
    {"mean": "median"},
    {"mean": "clipped"},
]
SAMPLES: list[Choice] = [
    {},
    {},
    {"fraction": 0.5},
    {"fraction": 0.7, "min-clients": 2, "clients": 4},
    {"min-clients": 1},
]
LENGTHS: list[Choice] = [
    {"rounds": 3},
    {"rounds": 3, "shuffle-every": "round"},
    {"rounds": 2, "record-by": "epoch"},
    {"rounds": 3, "evaluate-every": 2},
    {"local-steps-schedule": "post-local", "switch-epoch": 0.5, "record-by": "epoch", "rounds": 4},
    {"local-steps-schedule": "qsr", "qsr-alpha": 0.1, "record-by": "epoch", "rounds": 3},
    {"local-steps-schedule": "linear", "local-steps-max": 3, "record-by": "epoch", "epochs": 1.5},
    {"local-steps-schedule": "doubling", "local-steps-max": 4, "record-by": "epoch", "epochs": 1.5},
    {"local-steps-schedule": "table", "local-steps-table": "0.5:3,1:1", "record-by": "epoch", "rounds": 4},
    {"local-epochs": 1, "rounds": 2},
]
DELAYS: list[Choice] = [*[{}] * 9, {"delay": 1}]
RATES: list[Choice] = [
    {},
    {"schedule": "cosine"},
    {"schedule": "cosine", "schedule-unit": "epoch", "warmup-epochs": 0.5},
    {"schedule": "multistep", "milestones": "0.5,1", "gamma": 0.5},
    {"warmup-epochs": 1.0, "lr-scaling-batch": 8, "lr-scaling": "sqrt"},
]
SHARDS: list[Choice] = [{}, {}, {}, {"client-weights": "shard-size", "clients": 5}]
if importlib.util.find_spec("flwr_datasets"):
    SHARDS += [
        {
            "partition": "dirichlet",
            "partition-args": "alpha=5, min_partition_size=1",
            "small-shards": True,
            "client-weights": "shard-size",
        },
        {"partition": "linear", "small-shards": True},
        {"partition": "shard", "partition-args": "num_shards_per_partition=2, shard_size=4", "small-shards": True},
        {"partition": "square", "small-shards": True, "client-weights": "shard-size"},
    ]
OF_FLOWER = "flwr.serverapp.strategy:"
BEYOND_THE_REFERENCE: list[Choice] = [
    {"precision": "fp32"},
    {"compress": "topk", "compress-down": "topk"},
    {"compress": "fp16", "compress-down": "bf16"},
    {"compress": "int8", "compress-down": "topk"},
    {"compress": "topk", "compress-down": "sign"},
    {"compress": "sign", "compress-down": "int4"},
    {"compress": "topk:ratio=0.1+int8"},
    {"compress": "randomk:ratio=0.3+qsgd:levels=40"},
    {"outer": "fedexp"},
    {"outer": "slowmo:momentum=0.6"},
    {"test-model": "ema:decay=0.5"},
    {"outer": "yogi", "outer-args": "lr=0.01"},
    {"outer": "adamw", "outer-args": "lr=0.01, amsgrad=true"},
    {"outer": "asgd", "outer-args": ""},
    {"strategy": OF_FLOWER + "FedAdam", "strategy-args": "eta=0.01"},
    {"strategy": OF_FLOWER + "FedMedian"},
    {"strategy": OF_FLOWER + "FedTrimmedAvg"},
    {"strategy": OF_FLOWER + "FedAvgM", "strategy-args": "server_momentum=0.5"},
    {"strategy": OF_FLOWER + "FedYogi"},
    {"strategy": OF_FLOWER + "FedAdagrad"},
    {"strategy": OF_FLOWER + "Krum"},
    {"strategy": OF_FLOWER + "MultiKrum"},
    {"strategy": OF_FLOWER + "Bulyan"},
    {"strategy": OF_FLOWER + "QFedAvg", "strategy-args": "client_learning_rate=0.1"},
    {"strategy": "tests.strategies.user_strategies:OwnGenerator"},
]
STRAY: list[Choice] = [
    {"strategy": OF_FLOWER + "FedProx"},
    {"model": "lenet5", "crop-size": 16},
    {"augment": "none", "crop-padding": 4},
    {"augment": "tests.own_code:erase", "crop-padding": 4},
    {"model": "resnet20", "norm": "gn"},
    {"dataset": "tests.own_code:load", "crop-size": 10},
    {"batch-size": 13},
    {"lr-scaling": "sqrt"},
    {"gamma": 0.3},
    {"local-steps-schedule": "qsr", "qsr-alpha": 0.1, "record-by": "round"},
    {"partition": "pachinko"},
    {"compress-levels": 9},
    {"compress-ratio": 0.2},
    {"error-feedback": False},
    {"outer-args": "lr=0.5"},
    {"prox-mu": 0.1},
    {"trim": 0.3},
    {"batchnorm-images": 30},
    {"optimizer-args": "eps=1e-3"},
    {"momentum": 0.5},
    {"nesterov": True},
    {"beta1": 0.5},
    {"trust-coefficient": 0.1},
    {"lamb-clamp": 1.0},
    {"optimizer-backend": "torch-optimizer"},
    {"local-steps-max": 5},
    {"milestones": "1"},
    {"partition-args": "alpha=2"},
    {"strategy-args": "eta=1"},
    {"client-weights": "shard-size"},
    {"min-clients": 4},
    {"fraction": 0.1},
    {"validation": 8},
    {"norm": "gn"},
    {"record-by": "epoch"},
    {"precision": "tf32"},
    {"round-timeout": 5.0},
]


@st.composite
def combinations(draw: st.DrawFn) -> Choice:
    """Keys, most of which go together."""
    keys: Choice = {"lr": 0.02, "precision": "fp64"}
    seams = (OPTIMIZERS, RULES, MOMENTUM, BATCHNORM, OUTER, MEANS, SAMPLES, LENGTHS, DELAYS, RATES, SHARDS, MODELS)
    for choices in seams:
        keys |= draw(st.sampled_from(choices))
    keys |= {} if "local-epochs" in keys else {"local-steps": draw(st.integers(1, 3))}
    keys |= {"batch-size": draw(st.sampled_from([4, 4, 4, 4, 2, 1]))}
    keys |= {"clients": draw(st.sampled_from([4, 4, 3, 3, 2, 1])), "seed": draw(st.integers(0, 3)), **keys}
    codec = draw(st.sampled_from(CODECS))
    keys |= {"compress": codec, "compress-down": draw(st.sampled_from(CODECS if codec == "none" else ["none"]))}
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 1, 2]))):
        keys |= draw(st.sampled_from(BEYOND_THE_REFERENCE))
    for rule, others in NOT_WITH.items():
        if keys.get("local-rule", "").startswith(rule) and draw(st.integers(0, 9)):
            keys = {name: value for name, value in keys.items() if not re.match(others, name)}
    if keys.get("mean") != "trimmed":
        keys.pop("trim", None)
    if "strategy" in keys:  # it takes their places
        keys = {name: value for name, value in keys.items() if not re.match("compress|mean|trim|outer", name)}
        keys |= {"local-rule": "none"} if draw(st.booleans()) else {}
    for key in ("compress", "compress-down"):
        keys |= draw(st.sampled_from(OF_CODEC.get(keys.get(key, "none"), [{}])))
    if keys.get("compress", "none") != "none" and draw(st.booleans()):
        keys["error-feedback"] = False
    return keys | draw(st.sampled_from([{}] * 6 * len(STRAY) + STRAY))


class Shuffled(Counting, Pickled):
    """Messages are pickled (but for a stacked network), and replies come in another order than that of the clients."""

    chance = random.Random(0)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return self.chance.sample(replies := super().pull_messages(message_ids), len(replies))


def whole_run(config: Config, engine: Engine) -> Run:
    """A run with replies in any order, whose rows have the bytes of all messages."""
    run = Run(config, "localsgd", engine=engine)
    grid = Shuffled(client_app, config, stacked_trainers(config) if engine == "stacked" else [])
    with grid, run.lock():
        train_localsgd(grid, config, run)
    row = read_rows(run.folder)[-1]
    assert [row[f"bytes_{way}"] + row[f"overhead_bytes_{way}"] for way in ("up", "down")] == [grid.up, grid.down]
    assert not any(row["left_out"] for row in read_rows(run.folder))
    return run


def cut_run(config: Config, engine: Engine) -> Run:
    """The same run, cut in the middle and resumed."""
    rounds = run_plan(config).rounds
    execute(config.changed({"stop-after-rounds": max(1, rounds // 2)}), "localsgd", engine)
    return execute(config, "localsgd", engine)


def outcome(keys: Choice, engine: Engine, folder: Path) -> str:
    """What became of a combination: refused, run, or run and equal to the reference."""
    try:
        asked = Config().changed({**SMALL, **keys, "results-dir": str(folder)})
        config, _ = resolve_run(asked, "localsgd", engine)
        config = config.changed({"threads": 1})
        resumed = cut_run(config.changed({"name": "cut"}), engine)
    except UserError as error:
        note(f"refused: {error}")
        assert_one_line_that_names_a_key(str(error), keys)
        assert not [path for path in folder.iterdir() if path.is_dir()]
        return "refused"
    whole = whole_run(config.changed({"name": "whole"}), engine)
    assert_same_bits(final_model(resumed), final_model(whole))
    assert rows_of(resumed) == rows_of(whole)
    if not covers(config):
        return "run"
    expected = reference(config)
    for name, value in final_model(whole).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10)
    return "equal to the reference"


def assert_one_line_that_names_a_key(message: str, keys: Choice) -> None:
    assert message.isprintable()
    words = set(re.findall(r"[a-z][a-z0-9-]*", message))
    assert words & keys.keys(), f"no key of these is named: {message}"
    assert words & set(map(kebab, FIELDS))


def test_any_combination_is_refused_in_a_line_or_keeps_its_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the reference knows at least a third of those that are accepted."""
    monkeypatch.setenv(CORES, "2")  # as many groups of stacked clients
    seen = collections.Counter[str]()

    @given(combinations(), st.sampled_from(["local", "local", "stacked"]))
    @drawn
    def each(keys: Choice, engine: Engine) -> None:
        with tempfile.TemporaryDirectory(prefix="fedsim-") as folder:
            seen[outcome(keys, engine, Path(folder))] += 1

    each()
    print(dict(seen))
    accepted = seen["run"] + seen["equal to the reference"]
    assert seen["equal to the reference"] >= accepted / 3
    assert accepted >= seen["refused"]
