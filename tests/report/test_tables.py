from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.experiments.study import read_study
from fedsim.report.load import read_groups
from fedsim.report.tables import build_report, protocol
from fedsim.report.words import difference, label, percent
from tests.conftest import write_run


def report(root: Path, out: Path, figure: str = "") -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    build_report(root, out, figure, console)
    return console.export_text()


def test_the_page_needs_no_other_file_and_fits_a_phone(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    report(study.parent, out)
    page = (out / "index.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    links = Links()
    links.feed(page)
    assert [link[:22] for link in links.found if not link.startswith("#")] == ["data:image/png;base64,"] * 5
    assert page.count('<div class="wide"><table>') == page.count("<table>") == 3


class Links(HTMLParser):
    """Everything that a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


def test_what_is_to_be_known_of_the_papers_value_stands_beside_it(tmp_path: Path) -> None:
    cells = {cell.place: cell for cell in read_study("table2").cells([1])}
    cell = cells[12, 20]
    write_run(tmp_path / "results" / "table2" / str(cell.config.name), cell.config, cell.mode, [0.1, 0.3955])
    report(tmp_path / "results", tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "39.55 (paper 44.73, -5.18)" in text.replace("−", "-")
    (note,) = (line for line in text.splitlines() if line.startswith("The paper's value at K = 12, J = 20: "))
    assert "printed 39.28 at best" in note
    assert "The paper's value at K = 12, J = 30" not in text


def test_tables_show_means_deviations_and_what_is_missing(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    report(study.parent, out)
    text = (out / "report.md").read_text()
    assert "7 of 12 runs are finished, 1 more are begun; 2 of 6 cells have no finished run and are shown as –." in text
    assert "| J = 8 | 54.00 ± 1.41 | – |" in text  # best
    assert "| J = 8 | 53.00 ± 1.41 | – |" in text  # final
    assert "| large batch | 43.00 ± 1.41 | – |" in text
    assert "| K = 2, J = 1 | 2 of 2 | 44.00 ± 1.41 | 43.00 ± 1.41 | 4.00 | 32 | 32 | 0.1 | 0.1 |" in text
    assert "| K = 4, J = 8 | 0 of 2 (1 at epoch 4.0) | – | – | – | – | – | – | – |" in text
    assert "Protocol: tested on the test images, no validation split." in text
    assert "- commit: abc" in text
    assert "- device: cpu (of the test)" in text
    assert "- command: run.py paper" in text


def test_the_papers_values_stand_beside_with_the_difference(tmp_path: Path) -> None:
    cells = {cell.place: cell for cell in read_study("table1").cells([1])}
    for place, accuracies in ((("sgdm", 256), [0.53, 0.52]), (("lars", 256), [0.5, 0.5])):
        config = cells[place].config
        write_run(tmp_path / "results" / "table1" / config.name, config, "centralized", list(accuracies))
    report(tmp_path / "results", tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| batch = 256 | 53.00 (paper 52.71, +0.29) | 50.00 (paper 52.91, −2.91) | – (paper 54.22, –) |" in text
    assert "| batch = 256 | 52.00 (paper 52.38, −0.38) | 50.00 (paper 52.91, −2.91) | – (paper 54.22, –) |" in text
    assert "2 of 54 runs are finished" in text


def test_every_figure_has_its_files_and_a_command_that_remakes_it(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report(Path("results"), Path("report"))
    page = (tmp_path / "report" / "index.html").read_text()
    commands = re.findall(r"<code>python run.py (report results -o report --figure \S+)</code>", page)
    assert len(commands) == 5
    for command in commands:
        name = command.split()[-1]
        png, numbers = (tmp_path / "report" / f"{name}.{kind}" for kind in ("png", "csv"))
        before = png.read_bytes(), numbers.read_bytes()
        png.unlink()
        numbers.unlink()
        report(Path("results"), Path("report"), name)
        assert (png.read_bytes(), numbers.read_bytes()) == before
    assert (tmp_path / "report" / "index.html").read_text() == page
    with pytest.raises(
        UserError, match="figure = 'nothing' is not to be made of results: it must be one of mine-epochs"
    ):
        report(Path("results"), Path("report"), "nothing")


def test_warnings_are_counted_on_the_page_and_told(study: Path, tmp_path: Path) -> None:
    path = study / "k2-j1-seed1" / "metrics.jsonl"
    path.write_text("broken\n" + path.read_text())
    told = report(study.parent, tmp_path / "report")
    for text in (
        told,
        (tmp_path / "report" / "report.md").read_text(),
        (tmp_path / "report" / "index.html").read_text(),
    ):
        assert "1 broken rows are skipped, line 1" in text
    assert "1 warnings" in (tmp_path / "report" / "index.html").read_text()


def test_all_runs_are_in_a_csv(study: Path, tmp_path: Path) -> None:
    report(study.parent, tmp_path / "report")
    with (tmp_path / "report" / "mine-runs.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert len(rows) == 8
    assert float(rows["k2-j8-seed1"]["final_test_accuracy"]) == pytest.approx(0.52)
    assert (rows["k4-j8-seed1"]["finished"], rows["k4-j8-seed1"]["final_test_accuracy"]) == ("False", "")
    assert {row["tested_on"] for row in rows.values()} == {"test"}


def test_the_protocol_says_what_was_tested_on(tmp_path: Path) -> None:
    write_run(tmp_path / "choice" / "one", Config(validation=5000), "localsgd", [0.5])
    (group,), _ = read_groups(tmp_path)
    assert "tested on 5000 training images held out of training (key validation)" in protocol(group)
    report(tmp_path, tmp_path / "report")
    assert "accuracy on validation images" in (tmp_path / "report" / "report.md").read_text()


def test_words() -> None:
    assert label(("clients", "local-steps"), (4, 10)) == "K = 4, J = 10"
    assert label(("optimizer", "batch-size"), ("lars", 256)) == "lars, batch = 256"
    assert percent([]) == difference([], 3.0) == difference([0.5], None) == "–"
    assert percent([0.5]) == "50.00"
    assert percent([0.5, 0.52]) == "51.00 ± 1.41"
    assert (difference([0.5, 0.52], 50.0), difference([0.5], 51.5)) == ("+1.00", "−1.50")
