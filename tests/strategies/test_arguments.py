"""Choices by name, with their arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from strategies.arguments import OF_THE_RUN, Choice, above, at_least, at_most, below, check_fields, read_choice


@dataclass(frozen=True)
class Step:
    lr: Annotated[float, above(0)] = 0.1
    rounds: Annotated[int, at_least(1), at_most(10)] = 3
    betas: tuple[Annotated[float, below(1)], float] = (0.9, 0.99)
    nesterov: bool = False
    weight_decay: float = 0.0
    backend: Literal["ours", "theirs"] = "ours"
    seed: Annotated[int, at_least(0)] | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Sizes:
    """An argument without a default."""

    sizes: Annotated[tuple[int, ...], at_least(1)]


def function(groups: object, lr: Annotated[float, OF_THE_RUN], width=3, name="x", **others: Any) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
    return groups, lr, width, name, others


@dataclass(frozen=True)
class Nothing:
    """A method without arguments."""


KINDS: dict[str, Callable[..., Any]] = {"step": Step, "no-step": Nothing, "sizes": Sizes, "my.code:function": function}


def read(text: str) -> Choice:
    return read_choice(text, KINDS.__getitem__, leading=1)


@pytest.mark.parametrize(
    ("text", "made", "canonical"),
    [
        ("step", Step(), "step"),
        ("step:lr=1e-3", Step(lr=0.001), "step:lr=0.001"),
        ("step:lr=1", Step(lr=1.0), "step:lr=1"),
        ("step:lr=0.10", Step(), "step"),
        ("step: rounds = 4 , betas = 0.8/0.95 ", Step(rounds=4, betas=(0.8, 0.95)), "step:rounds=4,betas=0.8/0.95"),
        ("step:nesterov=true,lr=2", Step(lr=2.0, nesterov=True), "step:lr=2,nesterov=true"),
        ("step:weight_decay=0.5", Step(weight_decay=0.5), "step:weight-decay=0.5"),
        ("step:backend=theirs,seed=7", Step(backend="theirs", seed=7), "step:backend=theirs,seed=7"),
        ("step:seed=none", Step(), "step"),
        ("no_step", Nothing(), "no-step"),
        ("sizes:sizes=5", Sizes((5,)), "sizes:sizes=5"),
        ("sizes:sizes=5/6", Sizes((5, 6)), "sizes:sizes=5/6"),
    ],
)
def test_a_text_is_read_and_has_one_canonical_form(text: str, made: object, canonical: str) -> None:
    choice = read(text)
    assert choice.make() == made
    assert read(str(choice)) == choice
    assert str(choice) == canonical


def test_every_argument_has_its_value_whether_it_was_given_or_not() -> None:
    assert read("step:lr=2").arguments == {
        "lr": 2.0,
        "rounds": 3,
        "betas": (0.9, 0.99),
        "nesterov": False,
        "weight_decay": 0.0,
        "backend": "ours",
        "seed": None,
    }


def test_code_of_ones_own_has_arguments_by_its_signature_and_the_run_gives_the_rest() -> None:
    choice = read("my.code:function:width=5,more=1/2")
    assert str(choice) == "my.code:function:width=5,more=1/2"
    assert choice.make("groups", lr=0.3, unknown=1) == ("groups", 0.3, 5, "x", {"more": (1, 2)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step:lrr=1", "step has no argument lrr (did you mean lr?): it must be one of lr, rounds, betas, nesterov"),
        ("no-step:lr=1", "no-step has no argument lr: it takes none"),
        ("step:lr=", "step: lr =  must be a number greater than 0"),
        ("step:rounds", "step:rounds"),  # one's own code, which there is not
        ("step:nesterov=true,rounds", "step: rounds has no value: give rounds=..."),
        ("step:lr=1,lr=2", "step: lr is given twice: leave one of them out"),
        ("step:lr=fast", "step: lr = fast must be a number greater than 0"),
        ("step:lr=inf", "step: lr = inf must be a number greater than 0"),
        ("step:lr=0", "step: lr = 0 must be a number greater than 0"),
        ("step:rounds=1.5", "step: rounds = 1.5 must be a whole number at least 1 and at most 10"),
        ("step:rounds=11", "step: rounds = 11 must be a whole number at least 1 and at most 10"),
        ("step:nesterov=1", "step: nesterov = 1 must be true or false"),
        ("step:betas=0.5", "step: betas = 0.5 must be 2 numbers with a / between"),
        ("step:backend=other", "step: backend = other must be one of ours, theirs"),
        ("step:seed=-1", "step: seed = -1 must be a whole number at least 0"),
        (
            "sizes",
            "sizes needs sizes: give sizes:sizes=..., one or several whole numbers with a / between, each at least 1",
        ),
        ("sizes:sizes=1/0", "sizes: sizes = 1/0 must be one or several whole numbers"),
    ],
)
def test_what_it_cannot_be_is_one_line(text: str, message: str) -> None:
    with pytest.raises((ValueError, KeyError)) as caught:
        read(text)
    assert str(caught.value).strip("'").startswith(message)


def test_an_object_made_in_python_is_checked_too() -> None:
    with pytest.raises(ValueError, match=r"^Step: rounds = 11 must be a whole number at least 1 and at most 10$"):
        Step(rounds=11)
