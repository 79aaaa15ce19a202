"""Runs that begin from given weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.federation.server_app import check_localsgd
from fedsim.models import initial_model, starting_model
from tests.conftest import Execute, assert_same_bits, final_model, rows_of

SHORT: dict[str, Any] = {"rounds": 2, "checkpoint-every": 1}


def test_a_run_begins_where_another_ended(small: Config, run: Execute) -> None:
    first = run(name="first", **SHORT)
    config = small.changed({"init": str(first.folder / "model.pt")})
    assert_same_bits(starting_model(config).state_dict(), final_model(first))
    one = run(name="one", init=str(first.folder / "model.pt"), seed=1, **SHORT)
    other = run(name="other", seed=1, **SHORT)
    assert rows_of(one)[0]["train_loss"] != rows_of(other)[0]["train_loss"]
    losses = [
        rows_of(run("centralized", name=f"central{len(init)}", init=init, epochs=1.0))[0]["train_loss"]
        for init in (str(first.folder / "model.pt"), "")
    ]
    assert losses[0] != losses[1]


def test_a_resumed_run_is_the_uninterrupted_one_and_refuses_other_weights(
    small: Config, run: Execute, tmp_path: Path
) -> None:
    file = tmp_path / "given.pt"
    torch.save(initial_model(small.changed({"seed": 3})).state_dict(), file)
    whole = run(name="whole", init=str(file), **SHORT)
    run(name="parts", init=str(file), **SHORT, stop_after_rounds=1)
    assert_same_bits(final_model(run(name="parts", init=str(file), **SHORT)), final_model(whole))
    run(name="other", init=str(file), **SHORT, stop_after_rounds=1)
    torch.save(initial_model(small.changed({"seed": 4})).state_dict(), file)
    with pytest.raises(UserError, match=r"name = other: the weights of init = .*given\.pt have changed since the run"):
        run(name="other", init=str(file), **SHORT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nothing", "given.pt cannot be read"),
        ([1], "given.pt is no state_dict: give a run's model.pt"),
        ({"fc9.weight": torch.zeros(1)}, "given.pt has no conv1.bias, other than model = lenet5"),
        ("wide", "given.pt: conv1.weight is [1], and of model = lenet5 [6, 3, 5, 5]: give weights of this model"),
        ("nan", "given.pt: conv1.weight holds nan or inf: give other weights"),
        (None, "given.pt cannot be read (FileNotFoundError"),
    ],
)
def test_weights_that_do_not_fit_are_told_in_a_line(small: Config, tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "given.pt"
    weights = initial_model(small).state_dict()
    weights["conv1.weight"] = torch.zeros(1) if content == "wide" else weights["conv1.weight"] * float("nan")
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(weights if isinstance(content, str) else content, file)
    with pytest.raises(UserError) as caught:
        check_localsgd(small.changed({"init": str(file)}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
