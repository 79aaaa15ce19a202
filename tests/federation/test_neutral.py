"""Methods with neutral arguments, in any list of layers, train what plain averaging trains."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim.config import Config
from fedsim.experiments.execute import execute, resolve_run
from tests.conftest import TIMES, final_model

STREAMING = "streaming:fragments=1,delay=0,mix=0,lr=1,momentum=0,nesterov=false"
NEUTRAL: dict[str, list[str]] = {
    "local-rule": ["none", "fedprox:mu=0", "tests.own_methods:Drift:strength=0"],
    "layer": ["none", "tests.own_methods:Drift:strength=0", "tests.own_methods:Half:part=1"],
    "outer": [
        "none",
        "sgd",
        "slowmo:momentum=0",
        "diloco:lr=1,momentum=0,nesterov=false",
        "fedavgm:momentum=0",
        STREAMING,
    ],
    "compress": ["none", "topk:ratio=1", "randomk:ratio=1"],
    "compress-down": ["none", "topk:ratio=1"],
    "test-model": ["none", "ema:decay=0", "lawa:models=1"],
}
KEYS = {
    **{"model": "tests.own_code:batchnorm", "augment": "crop:size=12,padding=0+mirror", "batch-size": 4, "rounds": 3},
    **{"dataset": "synthetic:images=48", "precision": "fp64", "local-steps": 2, "clients": 3, "threads": 1},
}


def trained(small: Config, keys: dict[str, Any]) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory(prefix="fedsim-") as folder:
        config, _ = resolve_run(small.changed({**KEYS, **keys, "results-dir": folder}), "localsgd", "local")
        return final_model(execute(config, "localsgd"))


def test_in_any_list_they_are_plain_averaging(small: Config) -> None:
    plain = trained(small, {})
    lists = st.fixed_dictionaries({key: st.sampled_from(texts) for key, texts in NEUTRAL.items()})

    @settings(
        max_examples=12 * TIMES,
        derandomize=TIMES == 1,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    @given(lists)
    def each(keys: dict[str, Any]) -> None:
        found = trained(small, keys)
        for name, value in plain.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)

    each()


@pytest.mark.parametrize(("key", "text"), [("local-rule", "fedprox:mu=0.5"), ("outer", "slowmo:momentum=0.5")])
def test_with_other_arguments_they_are_not(small: Config, key: str, text: str) -> None:
    plain, other = trained(small, {}), trained(small, {key: text})
    assert max(float((other[name] - value).abs().max()) for name, value in plain.items()) > 1e-6
