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
from fedsim.report.result_table import method_names, read_tables
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
        self.text += data.replace("\xa0", " ")


def test_a_study_is_a_line_with_a_thumbnail_then_two_figures_and_the_rest_folded(study: Path, tmp_path: Path) -> None:
    report(study.parent, tmp_path / "report")
    text = (tmp_path / "report" / "index.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    page = Page(text)
    images = [link for link in page.links if link.startswith("data:image")]
    assert [link[:26] for link in images] == ["data:image/svg+xml;base64,"] * (
        1 + 2 * 2
    )  # a thumbnail; wide and narrow
    assert page.elements.count("figure") == 2
    assert page.text.count("J = 8 instead of J = 1: +10.00 ± 0.00 points") == 2  # in its line, and below its title
    folded = text[text.index("<details>") : text.index("</details>")]
    assert page.elements.count("table") == folded.count("<table>") == 1
    assert "<td>0 of 2<small>1 unfinished, to epoch 4.0</small></td>" in folded
    files = [link for link in page.links if not link.startswith(("#", "data:"))]
    assert len(files) == 2 * 3 + 1
    assert all((tmp_path / "report" / link).is_file() for link in files)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "\n| K = 2, J = 1 | 2 of 2 | 43.00 ± 1.41 |  | 4 |" in text
    assert "\n| K = 4, J = 8 | 0 of 2 (1 unfinished, to epoch 4.0) | 52.00 |" in text
    assert "\n- commit: abc\n" in text
    assert "\n![Final accuracy on test images" in text


def test_studies_that_belong_together_are_one_table_and_one_figure(tmp_path: Path) -> None:
    for name, key, values in (("m-outer", "outer", ("none", "slowmo")), ("m-compress", "compress", ("int8",))):
        for steps in (1, 4):
            for value in values:
                config = Config().changed({key: value, "local-steps": steps})
                write_run(tmp_path / name / f"{value}{steps}", config, "localsgd", [0.1, 0.5 - 0.01 * steps])
        toml = f'title = "{name}"\nmode = "localsgd"\ntogether = "m: all"\n[grid]\n{key} = {list(values)}\n'
        (tmp_path / name / "study.toml").write_text(f"{toml}local-steps = [1, 4]\n")
    (table,), _ = read_tables(tmp_path)
    assert (table.name, table.title, table.axes, table.about) == ("m", "m: all", ("method", "local-steps"), "method")
    methods = ("LocalSGD", "slowmo", "int8")
    assert list(table.cells["coords"]) == [(method, steps) for method in methods for steps in (1, 4)]
    assert len(table.runs) == 6
    cell = dict(enumerate(table.cells["label"]))
    runs = {cell[line.cell]: line.run for line in table.runs.itertuples()}
    assert runs["int8, J = 4"] == "int84"
    assert (table.rows.groupby("cell").size() == 2).all()
    report(tmp_path, tmp_path / "report", "m-accuracy")
    assert (tmp_path / "report" / "m-accuracy.png").is_file()


def test_a_key_that_a_large_batch_lacks_makes_no_method_of_it() -> None:
    local = {"outer": "none", "record-by": "epoch"}
    assert method_names([local, {**local, "outer": "slowmo"}, {}], []) == ["LocalSGD", "slowmo", "LocalSGD"]


def test_every_figure_is_remade_by_the_command_with_its_name(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["/usr/local/bin/fedsim"])
    report("results", "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "<code>fedsim report results -o report --figure mine-accuracy</code>" in page
    for name in ("mine-accuracy", "mine-epochs"):
        files = [tmp_path / "report" / f"{name}.{kind}" for kind in ("png", "svg", "csv")]
        before = [file.read_bytes() for file in files]
        for file in files:
            file.unlink()
        report("results", "report", name)
        assert [file.read_bytes() for file in files] == before
    with pytest.raises(
        UserError, match="figure = 'nothing' cannot be made of results: it must be one of mine-accuracy"
    ):
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
            assert len(re.findall(r"(?<!\\)\|", line)) in (6, 7)
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
