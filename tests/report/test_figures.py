from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedsim.config import Config
from fedsim.experiments.study import LARGE_BATCH, read_study
from fedsim.report.figures import (
    BYTES,
    EPOCHS,
    SYNCS,
    XAxis,
    mean_curves,
    pareto_front,
    plot_accuracy,
    plot_curves,
    plots_of,
)
from fedsim.report.result_table import ResultTable, read_tables
from fedsim.report.tables import accuracy_table, csv_text
from tests.conftest import write_run


def curve(table: ResultTable, axis: XAxis, *coords: int | str) -> pd.DataFrame:
    points = mean_curves(table, axis)
    return points[points["cell"] == list(table.cells["coords"]).index(coords)]


def test_a_mean_curve_is_the_mean_over_the_seeds_where_both_were_tested(table: ResultTable) -> None:
    points = curve(table, EPOCHS, 2, 8)
    assert list(points["epochs"]) == [1, 3, 4]
    assert list(points["accuracy_mean"]) == pytest.approx([0.1, 0.54, 0.53])
    assert list(points["accuracy_std"]) == pytest.approx([0, 0.02 / 2**0.5, 0.02 / 2**0.5])
    assert set(points["runs"]) == {2}
    assert list(curve(table, SYNCS, 2, 8)["syncs"]) == [1, 3, 4]
    assert list(curve(table, BYTES, 2, 1)["bytes"]) == [32_000, 96_000, 128_000]


def test_an_unfinished_run_is_a_curve_only_where_nothing_is_finished(study: Path) -> None:
    (study / "k2-j1-seed1" / "summary.json").unlink()
    (table,), _ = read_tables(study)
    assert set(curve(table, EPOCHS, 4, 8)["runs"]) == {1}
    assert set(curve(table, EPOCHS, 2, 1)["runs"]) == {1}
    assert curve(table, EPOCHS, 4, LARGE_BATCH).empty


def test_the_baselines_curve_along_bytes_is_data_parallel_sgd(table: ResultTable) -> None:
    assert list(curve(table, BYTES, 2, LARGE_BATCH)["bytes"]) == [rounds * 8 * 2 * 2 * 250 * 4 for rounds in (1, 3, 4)]
    assert list(curve(table, SYNCS, 2, LARGE_BATCH)["syncs"]) == [8, 24, 32]


def test_the_front_costs_more_and_gains_more_at_every_step() -> None:
    points = pd.DataFrame([(5, 9), (1, 5), (2, 4), (3, 7), (3, 6), (3, 7), (4, 7)], columns=["cost", "gain"])
    front = pareto_front(points["cost"], points["gain"])
    assert points[front].to_numpy().tolist() == [[5, 9], [1, 5], [3, 7], [3, 7]]  # twins are both on it
    assert pareto_front(points["cost"][:0], points["gain"][:0]).empty


def assert_nothing_is_cut(figure: Figure) -> None:
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure.get_tightbbox(canvas.get_renderer())
    width, height = figure.get_size_inches()
    assert box.x0 > -0.01
    assert box.y0 > -0.01
    assert box.x1 < width + 0.01
    assert box.y1 < height + 0.01
    sizes = {text.get_fontsize() for legend in figure.legends for text in legend.get_texts()}
    for panel in figure.axes:
        texts = [panel.title, panel.xaxis.label, panel.yaxis.label, *panel.texts]
        texts += [*panel.get_xticklabels(), *panel.get_yticklabels()]
        sizes |= {text.get_fontsize() for text in texts if text.get_text()}
    assert len(sizes) == 1


def test_every_figure_is_whole_and_a_png_and_its_numbers(table: ResultTable) -> None:
    makers = plots_of(table)
    assert list(makers) == [f"mine-{name}" for name in ("pareto", "epochs", "syncs", "bytes", "accuracy")]
    for name, make in makers.items():
        plot = make()
        assert plot.name == name
        assert plot.image("png", "run.py report").startswith(b"\x89PNG")
        assert_nothing_is_cut(plot.figure)
        phone = plot.draw(1)
        assert_nothing_is_cut(phone)
        assert len({panel.get_position().x0 for panel in phone.axes}) == 1
        lines = list(csv.reader(io.StringIO(csv_text(plot.numbers))))
        assert len(lines) == 1 + len(plot.numbers) > 1
        assert {len(line) for line in lines} == {len(plot.numbers.columns)}


def test_many_cells_with_long_names_are_not_cut(tmp_path: Path) -> None:
    for number in range(9):
        config = Config(optimizer="sgdm", momentum=number / 10, lr=0.1, epochs=number + 1.0, weight_decay=number)
        name = f"a-rather-long-name-of-a-run-number-{number}"
        write_run(tmp_path / "some" / name, config.changed({"warmup-epochs": number / 7}), "localsgd", [0.1, 0.5])
    for epochs in (1.0, 2.0):  # a key with the name of a curve's axis
        write_run(tmp_path / "epochs" / f"{epochs}", Config(epochs=epochs), "localsgd", [0.1, 0.5])
    tables, _ = read_tables(tmp_path)
    for make in [make for table in tables for make in plots_of(table).values()]:
        plot = make()
        assert_nothing_is_cut(plot.figure)
        assert_nothing_is_cut(plot.draw(1))
        assert csv_text(plot.numbers)


def test_accuracy_by_cell_holds_finished_runs_alone(table: ResultTable) -> None:
    rows = {tuple(row[:2]): row[2:] for row in plot_accuracy(table).numbers.to_numpy().tolist()}
    assert rows.keys() == {(2, 1), (2, 8), (2, LARGE_BATCH), (4, 1)}
    assert rows[2, 8] == pytest.approx([53, 2 / 2**0.5, 2])
    assert rows[4, 1] == pytest.approx([42, 0, 1])


def test_centralized_studies_have_no_figures_of_traffic(tmp_path: Path) -> None:
    (cell, *_) = read_study("table1").cells([1])
    write_run(tmp_path / "table1" / cell.config.name, cell.config, cell.mode, [0.1, 0.5])
    (table,), _ = read_tables(tmp_path)
    assert list(plots_of(table)) == ["table1-epochs", "table1-accuracy"]
    accuracy = plots_of(table)["table1-accuracy"]()
    assert accuracy.caption == "Best accuracy on test images. Hollow: the paper's."
    (legend,) = accuracy.figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {
        "sgdm",
        *(f"{o}, paper" for o in ("sgdm", "lars", "lamb")),
    }


def test_rows_stand_in_the_order_of_the_study_whichever_cells_are_finished(tmp_path: Path) -> None:
    cells = {cell.coords: cell.config for cell in read_study("table1").cells([1])}
    for place in (("sgdm", 512), ("lars", 256), ("lars", 512)):
        write_run(tmp_path / "table1" / cells[place].name, cells[place], "centralized", [0.5])
    (table,), _ = read_tables(tmp_path)
    assert [row[0].text for row in accuracy_table(table, "final").rows] == ["batch = 256", "batch = 512"]
    (legend,) = plot_curves(table, EPOCHS).draw(2).legends
    assert [text.get_text() for text in legend.get_texts()] == ["batch = 256", "batch = 512"]


def test_drift_is_a_mean_over_the_seeds_and_has_a_panel_for_each_measure(study: Path) -> None:
    """A cell without numbers, of one client or of an older version, has no line."""
    (before,), _ = read_tables(study)
    assert "mine-drift" not in plots_of(before)
    for seed in (1, 2):
        path = study / f"k2-j8-seed{seed}" / "metrics.jsonl"
        drift = {"update_norm": 2.0 * seed, "update_spread": 0.5}
        rows = [json.loads(line) | drift for line in path.read_text().splitlines()]
        rows[0]["update_cosine"] = 0.25 * seed
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (table,), _ = read_tables(study)
    plot = plots_of(table)["mine-drift"]()
    first, *others = list(csv.DictReader(io.StringIO(csv_text(plot.numbers))))
    assert first == {
        **{"clients": "2", "local-steps": "8", "epochs": "1", "update_norm": "3"},
        **{"update_cosine": "0.375", "update_spread": "0.5", "runs": "2"},
    }
    assert [row["update_cosine"] for row in others] == [""] * len(others)
    assert [len(panel.lines) for panel in plot.figure.axes] == [1, 1, 1]
