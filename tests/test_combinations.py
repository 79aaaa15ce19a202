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

from fedsim.config import FIELDS, Config, Engine
from fedsim.device import CORES
from fedsim.errors import UserError
from fedsim.experiments.execute import execute, resolve_run
from fedsim.federation.client_app import app as client_app
from fedsim.federation.in_process import stacked_trainers
from fedsim.federation.server_app import train_localsgd
from fedsim.runs.records import read_rows
from fedsim.runs.run import Run
from fedsim.training.run_plan import run_plan
from strategies.arguments import kebab
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
    "dataset": "synthetic:images=48",
    "augment.size": 12,
    "augment.padding": 0,
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
    {"optimizer.nesterov": True, "decay-biases-and-norms": False},
    {"optimizer": "lars:nesterov=true,trust=0.05"},
    {
        **{"optimizer": "lars:trust=0.05,lr-in-momentum=true"},
        **{"optimizer.adapt-undecayed": True, "decay-biases-and-norms": False},
    },
    {"optimizer": "lars:backend=torch-optimizer,trust=0.05"},
    {"optimizer": "lamb:bias-correction=moments", "decay-biases-and-norms": False},
    {"optimizer": "lamb:betas=0.8/0.999,bias-correction=step-size,clamp=0"},
    {"optimizer": "lamb:backend=torch-optimizer"},
    {"optimizer": "adamw:betas=0.8/0.9", "weight-decay": 0.01},
    {"optimizer": "adam:amsgrad=true,eps=1e-4"},
    {"optimizer": "adafactor"},
    {"optimizer": "adagrad:lr-decay=0.1"},
    {"optimizer": "adadelta", "lr": 1.0},
    {"optimizer": "adamax:eps=1e-4"},  # a smaller one blows rounding errors up
    {"optimizer": "nadam:eps=1e-3"},
    {"optimizer": "radam:eps=1e-4"},
    {"optimizer": "rmsprop:centered=true,momentum=0.5,eps=1e-3"},
    {"optimizer": "sgd:momentum=0.5,nesterov=true"},
    {"optimizer": "muon:other=rmsprop", "decay-biases-and-norms": False},
]
RULES: list[Choice] = [
    {},
    {},
    {"local-rule": "fedprox:mu=0.5"},
    {"local-rule": "scaffold"},
    {"local-rule": "feddyn:alpha=0.1"},
    {"local-rule": "fednova", "momentum-at-sync": "reset"},
    {"local-rule": "scaffold-inferred", "optimizer": "sgdm", "momentum": 0.0, "weight-decay": 0.0},
]
NOT_WITH = {  # the beginning of a rule -> keys that it is nearly always refused with
    "feddyn": "mean|layer|outer|compress",
    "fednova": "mean|layer|optimizer",
    "scaffold": "mean",
    "scaffold-inferred": "workers|fraction",
}
NOT_WITH_TOPOLOGY = "compress-down|layer|local-rule|mean|test-model"
MOMENTUM: list[Choice] = [
    *[{}] * 2,
    {"momentum-at-sync": "reset"},
    {"momentum-at-sync": "average"},
]
BATCHNORM: list[Choice] = [
    {},
    {"batchnorm-at-sync": "first-worker"},
    {"batchnorm-at-sync": "pooled"},
    {"batchnorm-at-sync": "local"},
    {"batchnorm-at-sync": "re-estimated:images=20"},
]
CODECS = ["none", "none", "none", "fp16", "bf16", "int8", "int4", "sign", "topk", "randomk", "qsgd", "powersgd"]
OF_CODEC: dict[str, list[Choice]] = {
    "topk": [{"ratio": 0.1}, {"ratio": 1.0}, {}],
    "randomk": [{"ratio": 0.3}],
    "qsgd": [{}, {"levels": 40}, {"levels": 3}],
    "powersgd": [{"rank": 1}, {"rank": 2}, {}],
}
OUTER: list[Choice] = [
    {},
    {},
    {},
    {"outer": "fedavgm"},
    {"outer": "slowmo:momentum=0.6"},
    {"outer": "diloco"},
    {"outer": "fedadam:lr=0.01,eps=0.01,bias-correction=true"},
    {"outer": "fedyogi:betas=0.5/0.9"},
    {"outer": "fedadagrad"},
    {"outer": "sgd:lr=0.5,momentum=0.5"},
]
MEANS: list[Choice] = [
    *[{}] * 6,
    {"mean": "trimmed:trim=0.4"},
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
    {"rounds": 3, "evaluate-clients-every": 1},
    {"local-steps-schedule": "post-local:switch-epoch=0.5", "record-by": "epoch", "rounds": 4},
    {"local-steps-schedule": "qsr:alpha=0.1", "record-by": "epoch", "rounds": 3},
    {"local-steps-schedule": "linear:max=3", "record-by": "epoch", "epochs": 1.5},
    {"local-steps-schedule": "doubling:max=4", "record-by": "epoch", "epochs": 1.5},
    {"local-steps-schedule": "table:epochs=0.5/1,steps=3/1", "record-by": "epoch", "rounds": 4},
    {"local-epochs": 1, "rounds": 2},
    {"local-steps-schedule": "adacomm:every=0.3,shrink=0.5", "record-by": "epoch", "epochs": 1.5},
    {"local-steps-schedule": "network:bandwidth=1Mbit,step=10ms", "record-by": "epoch", "epochs": 1.5},
    {"local-steps-schedule": "tests.own_methods:Growing", "record-by": "epoch", "epochs": 1.5},
]
WORKERS: list[Choice] = [
    *[{}] * 17,
    {"workers": "uneven:speed=0.3/1"},
    {"workers": "uneven:speed=0.3/0.9,away=0.3,varies=true"},
    {"workers": "uneven:away=0.5"},
]
TOPOLOGIES: list[Choice] = [
    *[{}] * 17,
    {"topology": "groups:size=1,every=2"},
    {"topology": "pairs"},
    {"topology": "ring"},
    {"topology": "exponential"},
]
DELAYS: list[Choice] = [*[{}] * 9, {"layer": "delay"}]
RATES: list[Choice] = [
    {},
    {"schedule": "cosine"},
    {"schedule": "cosine", "schedule-unit": "epoch", "warmup-epochs": 0.5},
    {"schedule": "multistep:milestones=0.5/1,gamma=0.5"},
    {"warmup-epochs": 1.0, "lr-scaling": "sqrt:batch=8"},
]
SHARDS: list[Choice] = [{}, {}, {}, {"mean.weights": "shard-size", "clients": 5}]
if importlib.util.find_spec("flwr_datasets"):
    SHARDS += [
        {"partition": "dirichlet:alpha=5,min-partition-size=1,small-shards=true", "mean.weights": "shard-size"},
        {"partition": "linear:small-shards=true"},
        {"partition": "shard:num-shards-per-partition=2,shard-size=4,small-shards=true"},
        {"partition": "square:small-shards=true", "mean.weights": "shard-size"},
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
    {"compress": "chunked-topk:ratio=0.1,chunk=32+int2"},
    {"momentum-at-sync": "average:momentum=2,second-moments=3"},
    {"outer": "fedexp"},
    {"outer": "streaming:fragments=2", "fraction": 1.0},
    {"outer": "streaming:fragments=2,delay=0,mix=0", "fraction": 1.0, "compress": "topk"},
    {"outer": "streaming:fragments=2,mix=0.3", "fraction": 1.0, "compress": "none", "compress-down": "int8"},
    {"outer": "slowmo:momentum=0.6"},
    {"test-model": "ema:decay=0.5"},
    {"test-model": "lawa:models=2"},
    {"mean": "edit:warmup=1,threshold=0.1,alpha=0.5,clip=0.1"},
    {"outer": "yogi:lr=0.01"},
    {"outer": "adamw:lr=0.01,amsgrad=true"},
    {"outer": "asgd"},
    {"outer": OF_FLOWER + "FedAdam:eta=0.01"},
    {"outer": OF_FLOWER + "FedMedian"},
    {"outer": OF_FLOWER + "FedTrimmedAvg"},
    {"outer": OF_FLOWER + "FedAvgM:server_momentum=0.5"},
    {"outer": OF_FLOWER + "FedYogi"},
    {"outer": OF_FLOWER + "FedAdagrad"},
    {"outer": OF_FLOWER + "Krum"},
    {"outer": OF_FLOWER + "MultiKrum"},
    {"outer": OF_FLOWER + "Bulyan"},
    {"outer": OF_FLOWER + "QFedAvg:client_learning_rate=0.1"},
    {"outer": "tests.strategies.user_strategies:OwnGenerator"},
]
STRAY: list[Choice] = [
    {"outer": OF_FLOWER + "FedProx"},
    {"model": "lenet5", "augment.size": 16},
    {"augment": "none"},
    {"augment": "tests.own_code:erase"},
    {"model": "resnet20:norm=gn"},
    {"dataset": "tests.own_code:load", "augment.size": 10},
    {"batch-size": 13},
    {"lr-scaling": "sqrt"},
    {"schedule.gamma": 0.3},
    {"local-steps-schedule": "qsr:alpha=0.1", "record-by": "round"},
    {"partition": "pachinko"},
    {"compress.levels": 9},
    {"compress.ratio": 0.2},
    {"error-feedback": False},
    {"outer.lr": "0.5"},
    {"local-rule.mu": 0.1},
    {"mean.trim": 0.3},
    {"batchnorm-at-sync.images": 30},
    {"optimizer.eps": "1e-3"},
    {"momentum": 0.5},
    {"optimizer.nesterov": True},
    {"optimizer.betas": "0.5/0.999"},
    {"optimizer.trust": 0.1},
    {"optimizer.clamp": 1.0},
    {"optimizer.backend": "torch-optimizer"},
    {"local-steps-schedule.max": 5},
    {"schedule.milestones": "1"},
    {"partition.alpha": "2"},
    {"outer.eta": "1"},
    {"mean.weights": "shard-size"},
    {"min-clients": 4},
    {"fraction": 0.1},
    {"validation": 8},
    {"model.norm": "gn"},
    {"record-by": "epoch"},
    {"precision": "tf32"},
    {"round-timeout": 5.0},
]


@st.composite
def combinations(draw: st.DrawFn) -> Choice:
    """Keys, most of which go together."""
    keys: Choice = {"lr": 0.02, "precision": "fp64"}
    first = (OPTIMIZERS, RULES, MOMENTUM, BATCHNORM, OUTER, MEANS)
    seams = (*first, SAMPLES, LENGTHS, DELAYS, RATES, SHARDS, MODELS, WORKERS)
    for choices in seams:
        keys |= draw(st.sampled_from(choices))
    keys |= {} if "local-epochs" in keys else {"local-steps": draw(st.integers(1, 3))}
    small = [4, 2] if keys.get("model", "").endswith("narrow") else [2, 1]
    keys |= {"batch-size": draw(st.sampled_from([4, 4, 4, 4, *small]))}
    keys |= {"clients": draw(st.sampled_from([4, 4, 3, 3, 2, 1])), "seed": draw(st.integers(0, 3)), **keys}
    codec = draw(st.sampled_from(CODECS))
    keys |= {"compress": codec, "compress-down": draw(st.sampled_from(CODECS if codec == "none" else ["none"]))}
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 1, 2]))):
        keys |= draw(st.sampled_from(BEYOND_THE_REFERENCE))
    for rule, others in NOT_WITH.items():
        if keys.get("local-rule", "").startswith(rule) and draw(st.integers(0, 9)):
            keys = {name: value for name, value in keys.items() if not re.match(others, name)}
    if keys.get("mean", "").startswith(("trimmed", "median")):  # they take no weights
        keys.pop("mean.weights", None)
    if OF_FLOWER in keys.get("outer", ""):  # it takes their places
        keys = {name: value for name, value in keys.items() if not re.match("compress|mean", name)}
        keys |= {"local-rule": "none"} if draw(st.booleans()) else {}
    for key in ("compress", "compress-down"):
        of_codec = draw(st.sampled_from(OF_CODEC.get(keys.get(key, "none"), [{}])))
        keys |= {f"{key}.{argument}": value for argument, value in of_codec.items()}
    if keys.get("compress", "none") != "none" and draw(st.booleans()):
        keys["error-feedback"] = False
    topology = draw(st.sampled_from(TOPOLOGIES))
    if len(topology) and draw(st.integers(0, 9)):
        keys = {name: value for name, value in keys.items() if not re.match(NOT_WITH_TOPOLOGY, name)}
    keys |= topology
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
    assert words & {name for key in keys for name in key.split(".")}, f"no key of these is named: {message}"
    assert words & set(map(kebab, FIELDS))


def test_any_combination_is_refused_in_a_line_or_keeps_its_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the reference knows at least a fifth of those that are accepted."""
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
    assert seen["equal to the reference"] >= accepted / 5
    assert accepted >= seen["refused"]


@pytest.mark.slow
def test_any_combination_that_is_accepted_has_the_same_bits_on_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a Ray of its own: FEDSIM_COMBINATIONS=300 tries 30."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv(CORES, "2")
    seen: collections.Counter[str] = collections.Counter()

    @settings(drawn, max_examples=MANY // 10 or 8)
    @given(combinations())
    def each(keys: Choice) -> None:
        with tempfile.TemporaryDirectory(prefix="fedsim-") as folder:
            try:
                asked = Config().changed({**SMALL, **keys, "results-dir": folder})
                config, _ = resolve_run(asked, "localsgd", "local")
                here = execute(config.changed({"name": "here"}), "localsgd")
            except UserError:
                seen["refused"] += 1
                return
            there = execute(config.changed({"name": "there"}), "localsgd", "flower")
            assert_same_bits(final_model(there), final_model(here))
            assert rows_of(there) == rows_of(here)
            seen["the same"] += 1

    each()
    print(dict(seen))
    assert seen["the same"]
