from __future__ import annotations

import io
import os
import re
import resource
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from fedsim.config import Config
from fedsim.errors import RunFailed, UserError
from fedsim.report.page import build_report, output_folder, show_results
from fedsim.report.result_table import read_tables
from tests.conftest import write_run


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder of results that holds one run."""
    return write_run(tmp_path / "results" / "some" / "one", Config(), "centralized", [0.1, 0.5]).parents[1]


def report(root: Path | str, out: Path | str, figure: str = "") -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    build_report(str(root), str(out), figure, console)
    return console.export_text()


class Page(HTMLParser):
    """Everything that a page refers to, its elements, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.elements: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.usefixtures("study")
def test_the_page_needs_no_other_file_and_each_figure_has_its_files_and_a_command_that_remakes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And Markdown holds the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["/usr/local/bin/fedsim"])
    report("results", "report")
    text = (tmp_path / "report" / "index.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    page = Page(text)
    assert [link[:26] for link in page.links if not link.startswith("#")] == ["data:image/svg+xml;base64,"] * 10
    assert page.text.index("Fewest bytes to") < page.text.index("against what was sent") < page.text.rindex("J = 8")
    assert text.count('<div class="wide"><table>') == page.elements.count("table") == 3
    assert "<td>52.00<small>unfinished, epoch 4.0</small></td>" in text
    text = (tmp_path / "report" / "report.md").read_text()
    assert "|  | K = 2 | K = 4 |\n| --- | ---: | ---: |\n| J = 1 | 44.00 ± 1.41 | 43.00 |\n" in text
    assert "| J = 8 | 53.00 ± 1.41 | 52.00 (unfinished, epoch 4.0) |\n" in text
    assert "\n- commit: abc\n" in text
    assert "\n![Final accuracy on test images." in text

    page_text = (tmp_path / "report" / "index.html").read_text()
    commands = re.findall(r"<code>fedsim (report results -o report --figure \S+)</code>", page_text)
    assert len(commands) == 5
    for command in (commands[0], commands[-1]):  # all are made in the same way
        name = command.split()[-1]
        files = [tmp_path / "report" / f"{name}.{kind}" for kind in ("png", "svg", "csv")]
        before = [file.read_bytes() for file in files]
        for file in files:
            file.unlink()
        report("results", "report", name)
        assert [file.read_bytes() for file in files] == before
    with pytest.raises(UserError, match="figure = 'nothing' cannot be made of results: it must be one of mine-pareto"):
        report("results", "report", "nothing")


def test_warnings_are_on_the_page_and_in_the_terminal(results: Path, tmp_path: Path) -> None:
    path = results / "some" / "one" / "metrics.jsonl"
    path.write_text("broken\n" + path.read_text())
    told = report(results, tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    for text in (told, (tmp_path / "report" / "report.md").read_text(), page):
        assert "1 damaged rows are skipped, line 1" in text
    assert "Warnings: 1" in page


HOSTILE = "r[/b]\x1b[31m<script>alert(1)<,script>|`*x$\\frac$\udcff"  # the last as a byte that is not UTF-8


def test_names_and_texts_are_shown_as_they_are(tmp_path: Path) -> None:
    for number in (1, 2):
        run = write_run(tmp_path / HOSTILE / f"{HOSTILE}{number}", Config(lr=number), "centralized", [0.5])
    (run.parent / "study.toml").write_text('title = "[/b]<script>|"\nmode = "centralized"\n[grid]\nlr = [1.0, 3.0]\n')
    (run / "summary.json").write_text((run / "summary.json").read_text().replace("run.py paper", "<script>|a\\nb"))
    (run / "metrics.jsonl").write_text("damaged")
    told = report(tmp_path, tmp_path / "report")
    assert "r[/b]\\x1b[31m<script>" in told
    page = (tmp_path / "report" / "index.html").read_text()
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert "script" not in Page(page).elements
    assert "<script>" in Page(page).text
    assert "<script>" not in markdown
    assert r"&lt;script&gt;\|a\\nb" in markdown
    for text in (told, page, markdown):
        assert "\x1b" not in text
    for line in markdown.splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 8)
    console = Console(record=True, width=200, file=io.StringIO())
    show_results(tmp_path, console)
    assert "[/b]<script>|" in console.export_text()


def test_a_full_disk_is_a_failed_run(results: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "index.html").symlink_to("/dev/full")
    with pytest.raises(RunFailed, match=r"out cannot be written \(No space left on device\): free some space"):
        report(results, tmp_path / "out")


def test_a_file_that_may_not_grow_is_a_failed_run(results: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(RunFailed, match="File too large"):
            report(results, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "out", ["{tmp}/file", "{tmp}/file/below", "~nosuchuser/out", "{tmp}/file/a\nb", "{tmp}/" + 300 * "n"]
)
def test_a_folder_that_cannot_be_made_is_bad_input(results: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"\Aout = [^\n]*: give another [^\n]*\Z"):
        report(results, out.format(tmp=tmp_path))


def test_a_folder_that_cannot_be_entered_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    user = os.geteuid()
    if user == 0:  # root may enter every folder
        os.seteuid(65534)
    try:
        with (
            pytest.raises(UserError, match=r"out = .* cannot be written \(Permission denied\)"),
            output_folder(f"{tmp_path}/closed/out"),
        ):
            pass
        with pytest.raises(UserError, match=r"results = .* cannot be read \(Permission denied\)"):
            read_tables(tmp_path / "closed" / "results")
    finally:
        os.seteuid(user)


def test_results_of_nobody_are_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="results = ~nosuchuser: there is no such home folder"):
        report("~nosuchuser", tmp_path)
