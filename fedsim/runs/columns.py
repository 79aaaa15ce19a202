"""The columns of metrics.jsonl, declared once: summaries, reports, data frames and trackers ask them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedsim.data.metric import Metric

LARGEST = 2**53  # integers up to this are exact as floats
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Quantity = Annotated[float, Field(ge=0, le=LARGEST)]
Accuracy = Annotated[float, Field(ge=0, le=1)]
Tested = float | list[float | None] | None  # a number, or those of each class or client
# Marks in the metadata of a column
TRACKED = "trackers such as TensorBoard draw it"
SENT = "bytes that were sent"
OF_UPDATES = "how far and how alike the workers have moved in the last round, and how far apart their models are"
OF_CLIENTS, OF_OWN_MODELS = "test_clients", "test_clients_own"  # lists: of each client, the metric of these models
RENAMED = {"local_steps": "steps_done"}  # former name in rows and summaries -> the present one


class Costs(BaseModel):
    """What a run has cost so far, which a summary has of its last row; None if not recorded.

    Bytes are those of all workers together.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    epoch: Annotated[Quantity | None, TRACKED] = None
    round: Natural | None = None
    steps_done: Natural | None = None  # local steps of each client
    syncs: Annotated[Natural | None, TRACKED] = None
    bytes_up: Annotated[Quantity | None, TRACKED, SENT] = None
    bytes_down: Annotated[Quantity | None, TRACKED, SENT] = None
    overhead_bytes_up: Annotated[Quantity | None, SENT] = None
    overhead_bytes_down: Annotated[Quantity | None, SENT] = None
    peak_bytes_up: Annotated[Quantity | None, SENT] = None  # the most of a round
    peak_bytes_down: Annotated[Quantity | None, SENT] = None  # likewise; the model that all begin from is not in it
    updates_left_out: Natural | None = None
    seconds: Annotated[Quantity | None, TRACKED] = None

    @model_validator(mode="before")
    @classmethod
    def _current(cls, record: Any) -> Any:
        """A record of any version with the names of now."""
        return current_columns(record) if isinstance(record, dict) else record


class MetricRecord(BaseModel):
    """The fields of `Metric`, in rows and summaries of runs that are not compared by accuracy."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^\w{1,100}$")]
    unit: str
    higher_is_better: bool
    examples: str

    @property
    def metric(self) -> Metric:
        """The metric."""
        return Metric(**self.model_dump())


class Columns(Costs):
    """A line of metrics.jsonl. Accuracies are fractions; other metrics are in `tests`, by their columns."""

    round: Natural
    epoch: Annotated[Quantity, TRACKED]
    steps_done: Natural
    test_accuracy: Annotated[Accuracy | None, TRACKED] = None
    round_steps: Annotated[Natural | None, TRACKED] = None  # J of the last round
    test_loss: Annotated[float | None, TRACKED] = None
    train_loss: Annotated[float | None, TRACKED] = None
    lr: Annotated[float | None, TRACKED] = None
    update_norm: Annotated[Quantity | None, TRACKED, OF_UPDATES] = None
    update_cosine: Annotated[float | None, TRACKED, OF_UPDATES] = None
    update_spread: Annotated[Quantity | None, TRACKED, OF_UPDATES] = None
    consensus_distance: Annotated[Quantity | None, TRACKED, OF_UPDATES] = None  # of models that are not one
    metric: MetricRecord | None = None
    tests: dict[str, Tested] = Field(default_factory=dict)

    def value(self, metric: Metric) -> float | None:
        """The value of a metric, if it was tested."""
        tested = {**self.tests, **self.model_dump(include={"test_accuracy", "test_loss"})}.get(metric.column)
        return None if isinstance(tested, list) else tested

    @model_validator(mode="before")
    @classmethod
    def _current(cls, record: Any) -> Any:
        """A row of any version as rows are now, with what was tested besides in `tests`."""
        if not isinstance(record, dict):
            return record
        if "metric" not in record and "test_accuracy" not in record:
            raise ValueError("test_accuracy is missing")
        row = current_row(record)
        return {**row, "tests": {n: row[n] for n in [*tests_in(row), *lists_in(row)] if n not in cls.model_fields}}


def tests_in(row: Mapping[str, Any]) -> list[str]:
    """The columns of a row that hold a number for what was tested, or none."""
    return [name for name, value in row.items() if name.startswith("test_") and isinstance(value, int | float | None)]


def lists_in(row: Mapping[str, Any]) -> list[str]:
    """The columns of a row that hold a list of what was tested, for instance of each class."""
    return [name for name, value in row.items() if name.startswith("test_") and isinstance(value, list)]


def names_with(mark: str) -> tuple[str, ...]:
    """The names of the columns with this mark."""
    return tuple(name for name, field in Columns.model_fields.items() if mark in field.metadata)


def current_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """`row`, a line of metrics.jsonl of any version, as rows are now; the version is left out."""
    for way in ("up", "down") if "version" not in row else ():
        whole, overhead = row.get(f"bytes_{way}"), row.get(f"overhead_bytes_{way}")
        if isinstance(whole, int | float) and isinstance(overhead, int | float):
            row = {**row, f"bytes_{way}": whole - overhead}  # they held the overhead too
    return current_columns({name: value for name, value in row.items() if name != "version"})


def current_columns(record: Mapping[str, Any]) -> dict[str, Any]:
    """A row or summary, also of an older run, with the names of now."""
    return {RENAMED.get(name, name): value for name, value in record.items()}
