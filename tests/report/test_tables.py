from __future__ import annotations

import json
from pathlib import Path

from fedsim.config import Config
from fedsim.data.metric import ACCURACY
from fedsim.experiments.study import read_study
from fedsim.report.differences import paired_differences
from fedsim.report.result_table import ResultTable, read_tables
from fedsim.report.tables import (
    Entry,
    csv_text,
    notes,
    number,
    origins,
    progress,
    result_table,
    runs_frame,
)
from tests.conftest import write_run


def lines(table: ResultTable) -> dict[str, dict[str, Entry]]:
    """The fields of each cell's line in the table of results, by the titles of their columns."""
    text = result_table(table, paired_differences(table))
    return {row[0].text: dict(zip(text.header, row, strict=True)) for row in text.rows}


def test_a_line_has_accuracy_difference_and_costs_with_one_accounting_of_traffic(table: ResultTable) -> None:
    found = lines(table)
    header = ["cell", "runs", "final", "difference", "epochs", "syncs", "MB sent", "minutes"]
    texts = {name: [entry.text for entry in line.values()] for name, line in found.items()}
    assert list(found["K = 2, J = 1"]) == header
    assert texts["K = 2, J = 1"] == ["K = 2, J = 1", "2 of 2", "43.00 ± 1.41", "", "4", "32", "0.128", "0.133"]
    assert texts["K = 2, J = 8"][2:4] == ["53.00 ± 1.41", "+10.00 ± 0.00"]
    assert found["K = 4, J = 8"]["runs"] == Entry("0 of 2", "1 unfinished, to epoch 4.0")
    # 32 steps of data-parallel SGD: 250 parameters of 4 bytes, 2 workers, both ways
    assert texts["K = 2, large batch"][5:7] == ["32", number(32 * 250 * 4 * 2 * 2 / 1e6)]
    assert "K = 4, large batch" not in found  # no test yet
    (traffic,) = (note for note in notes(table) if note.startswith("Traffic: "))
    assert "The large batch counts as data-parallel SGD" in traffic
    caption = result_table(table, paired_differences(table)).caption
    assert caption == "Accuracy on test images, %, mean ± standard deviation over seeds; costs of a run"


def test_updates_left_out_are_told_beside_their_cell(study: Path) -> None:
    for seed, left_out in ((1, 3), (2, 4)):
        path = study / f"k2-j8-seed{seed}" / "summary.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "updates_left_out": left_out}))
    (table,), _ = read_tables(study)
    assert lines(table)["K = 2, J = 8"]["runs"] == Entry("2 of 2", "7 updates left out")
    assert list(runs_frame(table)["updates_left_out"].dropna()) == [3, 4]


def test_one_worker_sends_nothing_anywhere(tmp_path: Path) -> None:
    for steps in (1, 2):
        write_run(tmp_path / "some" / f"{steps}", Config(clients=1, local_steps=steps), "localsgd", [0.5])
    (table,), _ = read_tables(tmp_path)
    assert not table.with_traffic
    assert not {"syncs", "MB sent"} & set(lines(table)["J = 1"])
    assert list(runs_frame(table)["syncs"]) == [1, 1]  # as recorded


def test_progress_and_provenance_are_told(table: ResultTable) -> None:
    assert progress(table) == (
        "Finished: 7 of 12 runs; unfinished: 1 (shown only where no run of the cell is finished); "
        "without any test and left out: 1 of 6 cells."
    )
    told = dict(origins(table))
    assert (told["commit"], told["device"], told["command"]) == ("abc", "cpu (of the test)", "run.py paper")


def test_the_papers_values_stand_beside_with_the_difference(tmp_path: Path) -> None:
    cells = {cell.coords: cell for cell in read_study("table1").cells([1])}
    for place, accuracies in ((("sgdm", 256), [0.53, 0.52]), (("lars", 256), [0.5, 0.5])):
        config = cells[place].config
        write_run(tmp_path / "table1" / config.name, config, "centralized", list(accuracies))
    config = cells["sgdm", 512].config
    write_run(tmp_path / "table1" / config.name, config, "centralized", [0.4], finished=False)
    (table,), _ = read_tables(tmp_path)
    found = lines(table)
    papers = {name: line["the paper's best"] for name, line in found.items()}
    assert papers["sgdm, batch = 256"] == Entry("52.71", "+0.29")
    assert papers["lars, batch = 256"] == Entry("52.91", "−2.91")
    assert papers["sgdm, batch = 512"] == Entry("49.06")  # not finished
    assert found["sgdm, batch = 256"]["best"] == Entry("53.00")
    assert "lamb, batch = 1024" not in found


def test_a_comment_on_the_papers_value_is_told(tmp_path: Path) -> None:
    cell = next(cell for cell in read_study("table2").cells([1]) if cell.coords == (12, 20))
    write_run(tmp_path / "table2" / str(cell.config.name), cell.config, cell.mode, [0.1, 0.3955])
    (table,), _ = read_tables(tmp_path)
    (note,) = (note for note in notes(table) if note.startswith("The paper's value at K = 12, J = 20: "))
    assert "printed 39.28 at best" in note


def test_runs_have_a_column_for_each_key_that_varies(tmp_path: Path) -> None:
    for model, lr in (("lenet5", 0.1), ("lenet-bn", 0.2)):
        write_run(tmp_path / "some" / model, Config().changed({"model": model, "lr": lr}), "localsgd", [0.5])
    write_run(tmp_path / "some" / "begun", Config(model="lenet5", lr=0.3), "localsgd", [0.3], finished=False)
    (table,), _ = read_tables(tmp_path)
    frame = runs_frame(table).set_index("run")
    assert frame[["model", "lr"]].to_numpy().tolist() == [["lenet-bn", 0.2], ["lenet5", 0.1], ["lenet5", 0.3]]
    assert "momentum" not in frame
    assert list(frame.loc["begun"][["finished", "last_test_accuracy"]]) == [False, 0.3]
    assert frame.loc["begun"][["final_test_accuracy", "best_test_accuracy"]].isna().all()
    assert frame.loc["lenet5"]["final_test_accuracy"] == 0.5


def test_a_text_that_a_spreadsheet_would_run_is_quoted(tmp_path: Path) -> None:
    write_run(tmp_path / "some" / "=1+1", Config(), "localsgd", [0.5])
    (table,), _ = read_tables(tmp_path)
    header, line = csv_text(runs_frame(table)).splitlines()
    assert line.startswith("'=1+1,localsgd,")
    assert len(line.split(",")) == len(header.split(","))


def test_the_protocol_states_what_was_tested_on(tmp_path: Path) -> None:
    write_run(tmp_path / "choice" / "one", Config(validation=5000), "localsgd", [0.5])
    (table,), _ = read_tables(tmp_path)
    assert "tested on 5000 training images held out of training (key validation)" in notes(table)[0]
    assert "on validation images" in result_table(table, paired_differences(table)).caption


def test_numbers() -> None:
    assert (ACCURACY.number(0.5), ACCURACY.number(0.51, 0.0141)) == ("50.00", "51.00 ± 1.41")
    shown = [number(value) for value in (359290.0, 1234.5, 100, 26.7345, 0.0642, 4.0, float("nan"))]
    assert shown == ["359,290", "1,234", "100", "26.7", "0.0642", "4", "–"]
    told = ACCURACY.difference
    assert (told(-0.0125), told(0.01, 0.002), told(float("nan"))) == ("−1.25", "+1.00 ± 0.20", "")
