from __future__ import annotations

from pathlib import Path

import pytest

from fedsim.config import Config
from fedsim.report.differences import confidence, paired_differences
from fedsim.report.result_table import ResultTable, read_tables
from tests.conftest import write_run


def test_differences_are_paired_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    for steps, seed, final in ((1, 1, 0.5), (1, 2, 0.54), (4, 1, 0.4), (4, 2, 0.43), (4, 3, 0.9), (16, 3, 0.3)):
        config = Config(local_steps=steps, seed=seed)
        write_run(tmp_path / "s" / f"{steps}-{seed}", config, "localsgd", [0.3, final], bytes_up=1000.0 / steps)
    (table,), _ = read_tables(tmp_path)
    (line,) = paired_differences(table).to_dict("records")  # J = 16 has no seed in common with J = 1
    assert line["change"] == pytest.approx(-0.105)
    assert line["interval"] == pytest.approx(12.7062 * 0.005)  # of two values: t times half of their distance
    assert (line["seeds"], line["sent"]) == (2, (250 + 1000) / 2000)


def test_budgets_in_rounds_are_compared_at_the_end_of_the_shorter(tmp_path: Path) -> None:
    for steps, accuracies in ((1, [0.1, 0.2]), (2, [0.1, 0.3, 0.4])):
        config = Config().changed({"local-steps": steps, "rounds": 2})
        write_run(tmp_path / "s" / f"{steps}", config, "localsgd", list(accuracies), steps_done=steps)
    (table,), _ = read_tables(tmp_path)
    (line,) = paired_differences(table).to_dict("records")
    assert (line["change"], line["epoch"]) == (pytest.approx(0.1), 2.0)


def test_unfinished_runs_are_not_compared(table: ResultTable) -> None:
    changes = paired_differences(table)
    assert set(table.cells["label"][changes.index]) == {"K = 2, J = 8", "K = 2, large batch"}
    assert set(table.cells["label"][changes["reference"]]) == {"K = 2, J = 1"}


@pytest.mark.parametrize(("count", "quantile"), [(3, 4.3027), (11, 2.2281), (12, 2.2010), (31, 2.0423), (1001, 1.9623)])
def test_half_of_the_interval_is_students_quantile_times_the_error_of_the_mean(count: int, quantile: float) -> None:
    assert confidence(2.0, count) == pytest.approx(quantile * 2 / count**0.5, rel=1e-4)
