"""docs/six-ways.md: each mistake costs what the page says, about."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.pages import read_page, run_page

PAGE = read_page("six-ways.md")


def rows(text: str) -> dict[str, float]:
    """The mean accuracy in each row of the table that the page prints."""
    return {name: float(mean) for name, mean in re.findall(r"^(\w.*?) {2,}([\d.]+) ± [\d.]+$", text, re.MULTILINE)}


def test_each_mistake_costs_accuracy_at_the_first_seed() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {"__name__": "six_ways"}
    exec(program, names)
    right = names["train"](1, 8)
    for wrong in names["MISTAKES"]:
        assert names["train"](1, 8, wrong) < right - 5, wrong
    assert names["train"](1, 2, rounds=12) < right - 5 < names["train"](1, 2)
    assert {"right", *names["MISTAKES"]} <= rows(PAGE).keys()


@pytest.mark.slow
def test_the_page_prints_the_numbers_that_it_shows(tmp_path: Path) -> None:
    shown, printed = rows(PAGE), rows(run_page("six-ways.md", tmp_path))
    assert printed.keys() == shown.keys()
    for name, mean in printed.items():
        assert abs(mean - shown[name]) < 8, name  # another processor rounds otherwise, which training magnifies
