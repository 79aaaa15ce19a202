from __future__ import annotations

import csv
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from fedsim.config import Config
from fedsim.experiments.study import LARGE_BATCH, read_study
from fedsim.report.differences import paired_differences
from fedsim.report.figures import mean_curves, plot_curves, plot_metric, plots_of
from fedsim.report.result_table import ResultTable, read_tables
from fedsim.report.tables import csv_text, result_table, runs_frame
from tests.conftest import write_run


def curve(table: ResultTable, *coords: int | str) -> pd.DataFrame:
    points = mean_curves(table)
    return points[points["cell"] == list(table.cells["coords"]).index(coords)]


def test_a_mean_curve_is_the_mean_over_the_seeds_where_both_were_tested(table: ResultTable) -> None:
    points = curve(table, 2, 8)
    assert list(points["epochs"]) == [1, 3, 4]
    assert list(points["accuracy_mean"]) == pytest.approx([0.1, 0.54, 0.53])
    assert list(points["accuracy_std"]) == pytest.approx([0, 0.02 / 2**0.5, 0.02 / 2**0.5])
    assert set(points["runs"]) == {2}


def test_an_unfinished_run_is_a_curve_only_where_nothing_is_finished(study: Path) -> None:
    (study / "k2-j1-seed1" / "summary.json").unlink()
    (table,), _ = read_tables(study)
    assert set(curve(table, 4, 8)["runs"]) == {1}
    assert set(curve(table, 2, 1)["runs"]) == {1}
    assert curve(table, 4, LARGE_BATCH).empty


def test_runs_that_were_tested_once_are_points_and_no_curves(tmp_path: Path) -> None:
    for steps in (1, 2):
        write_run(tmp_path / "s" / f"{steps}", Config(local_steps=steps), "localsgd", [None, 0.5], bytes_up=1e6 / steps)
    (table,), _ = read_tables(tmp_path)
    assert list(plots_of(table)) == ["s-accuracy"]


def drawn(figure: Figure) -> list[tuple[str, float, list[list[float]]]]:
    """The face, the size and the points of every line of the first panel that has any."""
    lines: list[Any] = list(figure.axes[0].lines)
    found = [(str(line.get_markerfacecolor()), line.get_markersize(), line.get_xydata().tolist()) for line in lines]
    return [line for line in found if line[2]]


def test_the_large_batch_is_a_wider_hollow_circle_around_its_point(table: ResultTable) -> None:
    rings = [points for face, size, points in drawn(plot_metric(table).figure) if (face, size) == ("none", 12)]
    filled = [points for face, _, points in drawn(plot_metric(table).figure) if face != "none"]
    # as data-parallel SGD: 32 steps of 250 parameters, 4 bytes each, 2 workers, both ways
    assert rings == [[[32 * 250 * 4 * 2 * 2, pytest.approx(43)]]]
    assert [[128_000.0, pytest.approx(43)]] in filled  # J = 1, at the same bytes


def test_names_of_series_stand_beside_their_points_and_do_not_overlap(tmp_path: Path) -> None:
    """Seven methods within a point of each other."""
    methods = ("none", "slowmo", "diloco", "fedavgm", "fedadam", "fedyogi", "fedadagrad")
    for number, outer in enumerate(methods):
        for steps in (1, 4):
            config = Config().changed({"outer": outer, "local-steps": steps})
            final = 0.4 + 0.0015 * number - 0.02 * steps
            write_run(tmp_path / "s" / f"{outer}{steps}", config, "localsgd", [0.1, final], bytes_up=1e6 / steps)
    toml = f'title = "t"\nmode = "localsgd"\n[grid]\nouter = {list(methods)}\nlocal-steps = [1, 4]\n'
    (tmp_path / "s" / "study.toml").write_text(toml)
    (table,), _ = read_tables(tmp_path)
    for across in (1, 3):
        figure = plots_of(table)["s-accuracy"]().draw(across)
        canvas: Any = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        boxes = [Text.get_window_extent(text, renderer) for text in figure.axes[0].texts]  # without its line to a point
        assert len(boxes) == 7
        assert not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))


def test_categories_are_not_joined_by_lines(tmp_path: Path) -> None:
    """Where all cells send equally many bytes, accuracy is drawn against the rows of the table."""
    for precision in ("fp32", "bf16", "tf32"):
        write_run(tmp_path / "s" / precision, Config().changed({"precision": precision}), "localsgd", [0.1, 0.5])
    (table,), _ = read_tables(tmp_path)
    figure = plots_of(table)["s-accuracy"]().figure
    assert figure.axes[0].get_xlabel() == "precision"
    assert [len(points) for _, _, points in drawn(figure)] == [1, 1, 1]


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
    assert list(makers) == ["mine-accuracy", "mine-epochs"]
    for name, make in makers.items():
        plot = make()
        assert plot.name == name
        assert plot.image("png", "run.py report").startswith(b"\x89PNG")
        assert b"<text" not in plot.thumbnail("run.py report")
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
    (of_axis, some), _ = read_tables(tmp_path)
    for plot in [make() for make in plots_of(some).values()]:
        assert_nothing_is_cut(plot.figure)
        assert_nothing_is_cut(plot.draw(1))
        assert csv_text(plot.numbers)
    for make in plots_of(of_axis).values():
        assert csv_text(make().numbers)


def test_accuracy_by_cell_holds_finished_runs_alone(table: ResultTable) -> None:
    rows = {tuple(row[:2]): row[2:] for row in plot_metric(table).numbers.to_numpy().tolist()}
    assert rows.keys() == {(2, 1), (2, 8), (2, LARGE_BATCH), (4, 1)}
    assert rows[2, 8] == pytest.approx([16_000, 53, 2 / 2**0.5, 2])
    assert rows[4, 1] == pytest.approx([256_000, 42, 0, 1])


def test_centralized_studies_have_no_figures_of_traffic(tmp_path: Path) -> None:
    for cell in read_study("table1").cells([1])[:2]:
        write_run(tmp_path / "table1" / cell.config.name, cell.config, cell.mode, [0.1, 0.5])
    (table,), _ = read_tables(tmp_path)
    assert list(plots_of(table)) == ["table1-accuracy", "table1-epochs"]
    accuracy = plots_of(table)["table1-accuracy"]()
    assert accuracy.caption == "Best accuracy on test images against batch-size; hollow: the paper's."
    (legend,) = accuracy.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["the paper's"]


def test_rows_stand_in_the_order_of_the_study_whichever_cells_are_finished(tmp_path: Path) -> None:
    cells = {cell.coords: cell.config for cell in read_study("table1").cells([1])}
    for place in (("sgdm", 512), ("lars", 256), ("lars", 512)):
        write_run(tmp_path / "table1" / cells[place].name, cells[place], "centralized", [0.1, 0.5])
    (table,), _ = read_tables(tmp_path)
    names = [row[0].text for row in result_table(table, paired_differences(table)).rows]
    assert names == ["sgdm, batch = 512", "lars, batch = 256", "lars, batch = 512"]
    (legend,) = plot_curves(table).draw(2).legends
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


def test_what_was_tested_of_each_client_is_sorted_and_other_metrics_are_in_the_table(study: Path) -> None:
    for seed in (1, 2):
        path = study / f"k2-j8-seed{seed}" / "summary.json"
        clients = {"final_test_clients": [0.5, None, 0.1 * seed], "final_test_clients_worst": 0.1 * seed}
        summary = json.loads(path.read_text()) | clients | {"final_test_margin": 2.0 * seed}
        path.write_text(json.dumps(summary))
    (table,), warnings = read_tables(study)
    assert not warnings
    plot = plots_of(table)["mine-spread"]()
    numbers = list(csv.DictReader(io.StringIO(csv_text(plot.numbers))))
    assert {(row["clients"], row["local-steps"]) for row in numbers} == {("2", "8")}
    assert [float(row["final_test_clients"]) for row in numbers[::5]] == pytest.approx([0.15, 0.325, 0.5])
    shown = result_table(table, paired_differences(table))
    columns = [shown.header.index(name) for name in ("worst client", "margin")]
    texts = {row[0].text: [row[column].text for column in columns] for row in shown.rows}
    assert texts["K = 2, J = 8"] == ["15.00", "3"]
    assert texts["K = 2, J = 1"] == ["\N{EN DASH}", "\N{EN DASH}"]
    assert {"final_test_margin", "final_test_clients_worst"} <= set(runs_frame(table))
