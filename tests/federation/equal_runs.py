"""One run in three ways that must end with the same bits: whole, in two parts, and with pickled messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fedsim.config import Config
from fedsim.device import resolve
from fedsim.federation import client_app
from fedsim.federation.server_app import train_localsgd
from fedsim.runs.run import Run
from tests.conftest import Execute, assert_same_bits, final_model, rows_of
from tests.federation.test_messenger import Pickled


class EqualRuns(NamedTuple):
    """The three runs."""

    whole: Run
    parts: Run
    pickled: Run


def resumed_and_pickled(small: Config, run: Execute, keys: Mapping[str, Any]) -> EqualRuns:
    """Run `small` with `keys` (kebab-case) in the three ways, the parts cut after three rounds, and compare them."""
    whole, parts = stopped_and_resumed(run, keys)
    config = resolve(small.changed({"name": "pickled", **keys}), "localsgd")
    pickled = Run(config, "localsgd")
    with Pickled(client_app.app, config) as grid:
        train_localsgd(grid, config, pickled)
    assert_same_bits(final_model(pickled), final_model(whole))
    return EqualRuns(whole, parts, pickled)


def stopped_and_resumed(run: Execute, keys: Mapping[str, Any], **stop: float) -> tuple[Run, Run]:
    """Run `small` with `keys` whole and in two parts, the first of three rounds or as `stop` says; compare the two."""
    whole = run(name="whole", **keys)
    run(name="parts", **{**keys, **(stop or {"stop-after-rounds": 3})})
    parts = run(name="parts", **keys)
    assert_same_bits(final_model(parts), final_model(whole))
    assert rows_of(parts) == rows_of(whole)
    return whole, parts
