from __future__ import annotations

from pathlib import Path

import pytest

from fedsim.config import Config
from fedsim.report.answers import answers
from fedsim.report.result_table import ResultTable, read_tables
from tests.conftest import write_run


def only(root: Path) -> ResultTable:
    (table,), _ = read_tables(root)
    return table


def test_fewest_bytes_and_what_j_costs_with_deviations_over_seeds(study: Path) -> None:
    assert answers(only(study)) == [
        "Fewest bytes to 50.35 %, which is 95 % of the best final accuracy of cells that send (53.00 ± 1.41 % at "
        "K = 2, J = 8, 2 seeds): K = 2, J = 8 with 0.0 MB (2 seeds).",
        "K = 2: J = 8 instead of J = 1 gains 10.00 ± 0.00 points of test accuracy at equal samples and sends 8 times "
        "fewer bytes (2 seeds).",
    ]


def test_the_best_cell_is_compared_with_the_cheapest_that_comes_near(tmp_path: Path) -> None:
    for steps, seed, final, sent in ((1, 1, 0.5, 8e6), (1, 2, 0.52, 8e6), (4, 1, 0.49, 2e6), (16, 1, 0.2, 5e5),
                                     (16, 2, 0.2, 5e5), (16, 3, 0.1, 5e5)):  # fmt: skip
        folder, config = tmp_path / "s" / f"{steps}-{seed}", Config(local_steps=steps, seed=seed)
        write_run(folder, config, "localsgd", [0.3, final], bytes_up=sent, bytes_down=sent)
    best, cost = answers(only(tmp_path))
    assert best == (
        "Fewest bytes to 48.45 %, which is 95 % of the best final accuracy of cells that send (51.00 ± 1.41 % at "
        "J = 1, 2 seeds): J = 4 with 8.0 MB (one seed); J = 1 needs 32.0 MB (2 seeds)."
    )
    assert cost == (
        "J = 16 instead of J = 1 costs 31.00 ± 1.41 points of test accuracy at equal samples and sends 16 times fewer "
        "bytes (2 seeds)."
    )


def test_a_method_is_compared_with_none_where_all_else_is_equal(tmp_path: Path) -> None:
    for outer, steps, seed, final in (("slowmo", 1, 1, 0.5), ("none", 1, 1, 0.4), ("none", 1, 2, 0.3),
                                      ("slowmo", 1, 2, 0.5), ("slowmo", 2, 1, 0.6), ("none", 4, 1, 0.6)):  # fmt: skip
        config = Config().changed({"outer": outer, "local-steps": steps, "seed": seed})
        write_run(tmp_path / "s" / f"{outer}-{steps}-{seed}", config, "localsgd", [0.1, final])
    compared = [text for text in answers(only(tmp_path)) if "instead of none" in text]
    assert compared == [
        "J = 1: slowmo instead of none gains 15.00 ± 7.07 points of test accuracy at equal samples (2 seeds)."
    ]


def test_budgets_in_rounds_are_compared_at_the_end_of_the_shorter(tmp_path: Path) -> None:
    for steps, accuracies in ((1, [0.1, 0.2]), (2, [0.1, 0.3, 0.4])):
        config = Config().changed({"local-steps": steps, "rounds": 2, "validation": 50})
        write_run(tmp_path / "s" / f"{steps}", config, "localsgd", list(accuracies), steps_done=steps)
    assert answers(only(tmp_path))[1] == (
        "J = 2 instead of J = 1 gains 10.00 points of validation accuracy at epoch 2.0 of both (one seed)."
    )


@pytest.mark.parametrize("finished", [True, False])
def test_a_study_without_traffic_has_a_best_cell(tmp_path: Path, finished: bool) -> None:
    for lr, final in ((0.1, 0.2), (0.2, 0.4)):
        write_run(tmp_path / "s" / f"{lr}", Config(lr=lr), "centralized", [0.1, final], finished)
    said = (
        "Highest final accuracy on test images: 40.00 % at lr = 0.2, one seed; lowest: 20.00 % at lr = 0.1, one seed."
    )
    assert answers(only(tmp_path)) == [said if finished else "No run is finished: accuracies are those so far."]
