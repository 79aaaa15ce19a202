"""Outer optimizers within a run; their formulas are tested in tests/test_reference.py and tests/strategies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.registry import OUTER_STEPS
from strategies.outer import OUTER
from tests.conftest import SMALL_BATCHNORM, Execute, assert_same_bits, final_model, rows_of
from tests.federation.equal_runs import stopped_and_resumed


def test_the_key_knows_the_names_of_the_strategies() -> None:
    assert {"fedexp", "streaming", *OUTER} == set(OUTER_STEPS.names)


@pytest.mark.parametrize("outer", ["sgd", "slowmo:momentum=0", "diloco:lr=1,momentum=0,nesterov=false"])
def test_at_its_identity_a_run_is_the_plain_one_bitwise(run: Execute, outer: str) -> None:
    plain = run(name="plain", epochs=1.0)
    same = run(name="same", epochs=1.0, outer=outer)
    assert_same_bits(final_model(same), final_model(plain))
    assert rows_of(same) == rows_of(plain)


@pytest.mark.parametrize(
    "keys",
    [
        # the last epoch's rate of this schedule is 0: the last rounds have no pseudo-gradient in units of the rate
        {"outer": "slowmo", "schedule": "cosine", "schedule_unit": "epoch", "epochs": 3.0, "warmup_epochs": 1.0},
        {"outer": "fedadam:lr=0.01,betas=0.8/0.95"},
    ],
)
def test_a_run_that_is_stopped_and_resumed_is_never_stopped_bitwise(run: Execute, keys: dict[str, object]) -> None:
    whole, _ = stopped_and_resumed(run, keys)
    state = torch.load(whole.folder / "checkpoint.pt", weights_only=True)["state"]["outer"]
    assert state["fc3.bias/momentum_buffer" if keys["outer"] == "slowmo" else "fc3.bias/v"].any()
    plain = run(name="plain", **{name: value for name, value in keys.items() if not name.startswith("outer")})
    assert not torch.equal(final_model(plain)["fc3.bias"], final_model(whole)["fc3.bias"])


def test_buffers_do_not_pass_through_it(run: Execute) -> None:
    """After one round, in which all workers start alike, BatchNorm's statistics are those of plain averaging."""
    keys = {"model": SMALL_BATCHNORM, "rounds": 1}
    plain, outer = final_model(run(name="plain", **keys)), final_model(run(name="outer", outer="fedadam", **keys))
    statistics = [name for name in plain if name.startswith("bn") and not name.endswith(("weight", "bias"))]
    assert len(statistics) == 3
    assert_same_bits({name: outer[name] for name in statistics}, {name: plain[name] for name in statistics})
    assert not torch.equal(outer["fc3.weight"], plain["fc3.weight"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"outer": "diloco:mu=0.9"}, "outer = diloco:mu=0.9: diloco has no argument mu: it must be one of lr, mom"),
        ({"outer": "sgd:fused=true"}, "sgd has no argument fused"),
        ({"outer": "adam:betas=0.9"}, "outer = adam:betas=0.9: adam: betas = 0.9 must be 2 numbers"),
        ({"outer": "sgd:lr=-1"}, "outer = sgd:lr=-1: sgd: Invalid learning rate: -1"),
        ({"outer.lr": "0.5"}, "outer.lr = 0.5: none has no argument lr"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    run: Execute, tmp_path: Path, keys: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(**keys)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["lr=", "lr=fast", "lr=1e999", "=1", "lr=1, lr=2", "a b=1", "betas=0.9/", "betas=true/0.9", "lr=nan"]
)
def test_a_text_that_is_no_arguments_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^outer = adam:.*: adam"):
        Config().changed({"outer": f"adam:{text}"})
