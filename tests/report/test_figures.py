from __future__ import annotations

import csv
from pathlib import Path

import pytest

from fedsim.experiments.study import TWIN, read_study, study_names
from fedsim.report.figures import BYTES, EPOCHS, SYNCS, mean_curve, pareto_front, plot_accuracy, plots_of, save_plot
from fedsim.report.load import CellResults, Group, read_groups
from fedsim.report.paper_values import PaperValue, paper_value
from tests.conftest import write_run


@pytest.fixture
def group(study: Path) -> Group:
    (found,), _ = read_groups(study)
    return found


def cell_at(group: Group, *place: int | str) -> CellResults:
    return next(cell for cell in group.cells if cell.place == place)


def test_a_mean_curve_is_the_mean_over_the_seeds_where_both_were_tested(group: Group) -> None:
    curve = mean_curve(cell_at(group, 2, 8), EPOCHS)
    assert [point.x for point in curve] == [1, 3, 4]
    assert [point.mean for point in curve] == pytest.approx([0.1, 0.54, 0.53])
    assert [point.spread for point in curve] == pytest.approx([0, 0.02 / 2**0.5, 0.02 / 2**0.5])
    assert {point.runs for point in curve} == {2}
    assert [point.x for point in mean_curve(cell_at(group, 2, 8), SYNCS)] == [1, 3, 4]
    assert [point.x for point in mean_curve(cell_at(group, 2, 1), BYTES)] == [32_000, 96_000, 128_000]


def test_an_unfinished_run_is_a_curve_only_where_nothing_is_finished(group: Group) -> None:
    assert {point.runs for point in mean_curve(cell_at(group, 4, 8), EPOCHS)} == {1}
    assert mean_curve(cell_at(group, 4, TWIN), EPOCHS) == []


def test_a_twins_curve_along_bytes_is_data_parallel_sgd(group: Group) -> None:
    points = mean_curve(cell_at(group, 2, TWIN), BYTES)
    assert [point.x for point in points] == [rounds * 8 * 2 * 2 * 250 * 4 for rounds in (1, 3, 4)]
    assert [point.x for point in mean_curve(cell_at(group, 2, TWIN), SYNCS)] == [8, 24, 32]


def test_the_front_costs_more_and_gains_more_at_every_step() -> None:
    points = [(1, 5), (2, 4), (3, 7), (3, 6), (4, 7), (5, 9)]
    assert pareto_front(points) == [(1, 5), (3, 7), (5, 9)]
    assert pareto_front([]) == []


def test_every_figure_is_a_png_and_its_numbers(group: Group, tmp_path: Path) -> None:
    makers = plots_of(group)
    assert list(makers) == [f"mine-{name}" for name in ("epochs", "syncs", "bytes", "pareto", "accuracy")]
    for name, make in makers.items():
        plot = make()
        assert plot.name == name
        save_plot(plot, tmp_path, "run.py report")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        with (tmp_path / f"{name}.csv").open() as file:
            lines = list(csv.reader(file))
        assert len(lines) == 1 + len(plot.rows) > 1
        assert {len(line) for line in lines} == {len(plot.header)}


def test_accuracy_by_place_holds_finished_runs_alone(group: Group) -> None:
    rows = {tuple(row[:2]): row[2:] for row in plot_accuracy(group).rows}
    assert rows.keys() == {(2, 1), (2, 8), (2, TWIN), (4, 1)}
    assert rows[2, 8] == pytest.approx((53, 2 / 2**0.5, 2))
    assert rows[4, 1] == pytest.approx((42, 0, 1))


def test_centralized_studies_have_no_figures_of_traffic(tmp_path: Path) -> None:
    (cell, *_) = read_study("table1").cells([1])
    write_run(tmp_path / "table1" / cell.config.name, cell.config, cell.mode, [0.1, 0.5])
    (group,), _ = read_groups(tmp_path)
    assert list(plots_of(group)) == ["table1-epochs", "table1-accuracy"]
    accuracy = plots_of(group)["table1-accuracy"]()
    assert accuracy.caption == "Best accuracy on test images. Hollow: the paper's."
    (legend,) = accuracy.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "sgdm",
        *(f"{o}, paper" for o in ("sgdm", "lars", "lamb")),
    ]


def test_every_cell_of_the_papers_tables_has_the_papers_value() -> None:
    known = {"table1": 18, "table2": 6, "table2-bn": 6, "table1-scaled": 12}
    for name in study_names():
        study = read_study(name)
        group = Group(name, name, Path(), study.axes, [], study)
        cells = {cell.place: cell.config.identity(cell.mode) for cell in study.cells()}
        found = {place: paper_value(group, CellResults(place, keys, 1, [], 1)) for place, keys in cells.items()}
        assert sum(value is not None for value in found.values()) == known.get(name, 0)
        if name == "table1":
            assert found["lars", 2048] == PaperValue(56.91, 56.91, "")
        if name == "table1-scaled":
            assert found["sqrt", 8192] == found["linear", 8192] == PaperValue(19.74, 19.71, "")
        if name == "table2-bn":
            assert found[12, 30] == PaperValue(42.96, None, "")
