"""What runs of a task are compared by, and how its values are told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from strategies.arguments import split_name


@dataclass(frozen=True)
class Metric:
    """A mean over test examples, in the column ``test_NAME`` of rows; fractions have the unit %.

    `examples` is what the task calls its examples.
    """

    name: str
    unit: str = ""
    higher_is_better: bool = True
    examples: str = "examples"

    @property
    def column(self) -> str:
        """Its column in rows."""
        return f"test_{self.name}"

    @property
    def best(self) -> str:
        """The best of a run's tests, in summaries and tables."""
        return f"best_{self.column}"

    @property
    def final(self) -> str:
        """The last of a run's tests, in summaries and tables."""
        return f"final_{self.column}"

    @property
    def words(self) -> str:
        """Its name in a sentence."""
        return self.name.replace("_", " ")

    @property
    def label(self) -> str:
        """Its name with its unit, where that says more."""
        return self.words if self.unit in ("", self.words) else f"{self.words}, {self.unit}"

    @property
    def scale(self) -> int:
        """By which values are multiplied where they stand beside their unit."""
        return 100 if self.unit == "%" else 1

    @property
    def decimals(self) -> int:
        """The digits that are shown after the point."""
        return 2 if self.unit == "%" else 4

    def told(self, value: float) -> str:
        """A value as text, for instance 12.34%."""
        return f"{value:.2%}" if self.unit == "%" else f"{value:.{self.decimals}f}"

    def number(self, value: float, deviation: float = float("nan")) -> str:
        """A value in the unit, with its standard deviation if there is one."""
        shown = f"{self.scale * value:.{self.decimals}f}"
        return shown if math.isnan(deviation) else f"{shown} ± {self.scale * deviation:.{self.decimals}f}"

    def difference(self, change: float, interval: float = float("nan")) -> str:
        """A difference of two values with its sign, and half of its confidence interval if there is one."""
        if math.isnan(change):
            return ""
        text = f"{self.scale * change:+.{self.decimals}f}".replace("-", "−")
        return text if math.isnan(interval) else f"{text} ± {self.scale * interval:.{self.decimals}f}"

    @property
    def points(self) -> str:
        """What differences are in."""
        return "points" if self.unit == "%" else self.unit or f"of {self.words}"

    def with_unit(self, number: str) -> str:
        """A number as text with its unit, for instance 12.5 %."""
        return f"{number} {self.unit or self.words}"

    def on(self, tested_on: str) -> str:
        """What was measured and on which examples, as a title."""
        return f"{self.words[0].upper()}{self.words[1:]} on {tested_on} {self.examples}"

    def goal(self, target: float) -> str:
        """A target in words."""
        return self.with_unit(f"{self.scale * target:g}")

    def __str__(self) -> str:
        return self.words

    def best_of(self, values: list[float]) -> float | None:
        """The best of some values; None of none."""
        return (max if self.higher_is_better else min)(values, default=None)

    def reaches(self, value: Any, target: Any) -> Any:
        """Whether a value, or each of a column, is as good as the target."""
        return value >= target if self.higher_is_better else value <= target

    def near(self, best: float, part: float) -> float:
        """A value that is worse than the `best`: the `part` of it or, where lower is better, as much above it."""
        return part * best if self.higher_is_better else best + (1 / part - 1) * abs(best)

    def record(self) -> dict[str, Any]:
        """What a row or a summary holds of it: nothing for `ACCURACY`."""
        return {} if self == ACCURACY else {"metric": asdict(self)}


ACCURACY = Metric("accuracy", "%", examples="images")


def metric_name(chosen: str) -> str:
    """The name of a metric of the key metrics in columns, of what is chosen: that of the function."""
    return split_name(chosen)[0].rpartition(":")[2].replace("-", "_")


def metric_of(record: Mapping[str, Any]) -> Metric:
    """The metric of a row or summary; raises ValueError where it is damaged."""
    held = record.get("metric")
    if held is None:
        return ACCURACY
    try:
        return Metric(**held)
    except TypeError as error:
        raise ValueError(f"its metric {held} is damaged") from error
