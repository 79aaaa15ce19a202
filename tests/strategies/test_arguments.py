"""Methods by name with their arguments."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from strategies.arguments import by_name


@dataclass(frozen=True)
class Step:
    lr: float = 0.1
    rounds: int = 3
    betas: tuple[float, ...] = (0.9, 0.99)
    nesterov: bool = False
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Nothing:
    """A method without arguments."""


KINDS = {"step": Step, "no-step": Nothing}


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("step", Step()),
        ("step:lr=1e-3", Step(lr=0.001)),
        ("step:betas=0.8/0.95,nesterov=true,rounds=4", Step(betas=(0.8, 0.95), nesterov=True, rounds=4)),
        ("step:weight-decay=0.5", Step(weight_decay=0.5)),
        ("step:weight_decay=0.5", Step(weight_decay=0.5)),
        ("no_step", Nothing()),
    ],
)
def test_its_text_is_read(text: str, method: object) -> None:
    assert by_name(KINDS, text) == method


def test_arguments_given_besides_are_used_where_the_text_has_none() -> None:
    assert by_name(KINDS, "step", lr=0.5, other=1) == Step(lr=0.5)
    assert by_name(KINDS, "step:lr=0.25", lr=0.5) == Step(lr=0.25)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepp", r"stepp is unknown \(did you mean step\?\): it must be one of step, no-step"),
        ("step:lrr=1", r"step has no argument lrr \(did you mean lr\?\): it must be one of lr, rounds, betas"),
        ("no-step:lr=1", "no-step has no argument lr: it takes none"),
        ("step:lr", "step: lr has no value: give lr="),
        ("step:lr=fast", "step: lr = fast must be a number"),
        ("step:rounds=1.5", "step: rounds = 1.5 must be a whole number"),
        ("step:nesterov=1", "step: nesterov = 1 must be true or false"),
    ],
)
def test_what_it_cannot_be_is_told_in_a_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        by_name(KINDS, text)
