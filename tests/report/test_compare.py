from __future__ import annotations

import io
import platform
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.experiments.execute import execute
from fedsim.network import Network
from fedsim.report.compare import compare, show_differences, show_runs
from fedsim.report.page import show_results
from fedsim.report.result_table import NOTHING, read_tables
from fedsim.report.tables import Entry, TextTable, show_table
from fedsim.report.time_to_accuracy import Plan, time_to_accuracy
from tests.conftest import Execute, write_run


def printed(show: Callable[..., None], *arguments: object) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    show(*arguments, console)
    return console.export_text()


def methods(tmp_path: Path) -> list[Path]:
    """Two studies of two seeds: plain and SlowMo, 5 points above it; int8, 1 point below."""
    for name, key, value, above in (("a", "outer", "none", 0.0), ("a", "outer", "slowmo", 0.05),
                                    ("b", "compress", "int8", -0.01)):  # fmt: skip
        for seed in (1, 2):
            config = Config().changed({key: value, "seed": seed})
            write_run(tmp_path / name / f"{value}{seed}", config, "localsgd", [0.1, 0.4 + 0.02 * seed + above])
    return [tmp_path / "a", tmp_path / "b"]


def test_studies_read_apart_are_compared_over_equal_seeds(tmp_path: Path) -> None:
    text = printed(compare, list(map(str, methods(tmp_path))), str(tmp_path / "out"))
    assert "Against LocalSGD, above: slowmo; below: int8 (2 seeds)." in text
    assert "Against LocalSGD: slowmo +5.00 ± 0.00, int8 −1.00 ± 0.00." in text
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"comparison-runs.csv", "comparison-accuracy.png", "comparison-epochs.svg"} <= made


def test_cells_of_one_method_are_compared_by_their_studies(tmp_path: Path, study: Path) -> None:
    shutil.copytree(study, tmp_path / "other")
    text = printed(compare, [str(study), str(tmp_path / "other")], str(tmp_path / "out"))
    assert "The 2 values of study differ by at most 0.00 points" in text


def test_what_cannot_be_compared_is_refused(study: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs two folders"):
        printed(compare, [str(study)], str(tmp_path / "out"))
    with pytest.raises(UserError, match="diff needs the folders of two runs"):
        printed(show_differences, str(study), "")
    with pytest.raises(UserError, match=f"^{study} holds no run: give the folder of one"):
        printed(show_differences, str(study), str(study))


def test_the_keys_in_which_two_runs_differ(tmp_path: Path) -> None:
    keys = {"one": {"outer": "slowmo", "lr": 0.1}, "two": {"outer": "slowmo:momentum=0.7", "lr": 0.2}}
    one, other = (write_run(tmp_path / k, Config().changed(own), "localsgd", [0.5]) for k, own in keys.items())
    lines = printed(show_differences, str(one), str(other)).splitlines()
    assert lines == ["lr: 0.1 | 0.2", "outer: slowmo | slowmo:momentum=0.7", "outer.momentum: 0.5 | 0.7"]
    assert "same configuration" in printed(show_differences, str(one), str(one))
    single = write_run(tmp_path / "single", Config(outer="slowmo", lr=0.1, local_steps=1), "localsgd", [0.5])
    assert printed(show_differences, str(one), str(single)) == "local-steps: 10 | 1\n"  # it has no last, shorter round


def test_every_run_is_a_line(study: Path) -> None:
    words = [line.split() for line in printed(show_runs, str(study.parent)).splitlines()]
    lines = {own[0]: own for own in words if own and own[0].startswith("mine/")}
    assert len(lines) == len(list(study.glob("*/config.json")))
    finished, begun = lines["mine/k2-j1-seed1"], lines["mine/k4-j8-seed1"]
    assert finished[1:] == ["finished", NOTHING, "cpu", "43.00", "42.00", "0.128", "0.133"]  # when is not recorded
    assert (begun[1], len(begun)) == ("unfinished", len(finished) + 1)


def test_a_run_has_its_date_and_host(run: Execute) -> None:
    folder = run(rounds=1).folder
    words = printed(show_runs, str(folder.parent)).splitlines()[-2].split()
    assert abs(datetime.fromisoformat(f"{words[2]} {words[3]}") - datetime.now()) < timedelta(minutes=5)
    assert words[4:6] == [platform.node(), "cpu"]


def test_runs_of_two_tasks_have_their_units_and_no_target_in_common(tmp_path: Path, small: Config) -> None:
    text = small.changed({"dataset": "text:context=8", "model": "gpt-tiny:layers=1,width=8,heads=2", "rounds": 1})
    execute(text.changed({"name": "text", "normalize": "dataset"}), "localsgd")
    write_run(tmp_path / "images", small.changed({"rounds": 1}), "localsgd", [0.5])
    lines = printed(show_runs, str(tmp_path))
    assert "50.00 %" in lines
    assert "bits per byte" in lines
    assert [table.title.rpartition(": ")[2] for table in read_tables(tmp_path)[0]] == ["accuracy", "bits per byte"]
    plan = Plan(0.5, Network(1e6, 0.01))
    with pytest.raises(UserError, match="has runs compared by accuracy and bits per byte, of which a target is one"):
        time_to_accuracy(str(tmp_path), plan, str(tmp_path / "out"), "", Console())


@pytest.mark.parametrize(("width", "titles"), [
    (80, "cell runs final difference syncs MB sent"),
    (60, "cell runs final difference MB sent"),
    (40, "cell final MB sent"),
])  # fmt: skip
def test_a_narrow_terminal_has_the_columns_that_fit(tmp_path: Path, width: int, titles: str) -> None:
    methods(tmp_path)
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    show_results(tmp_path / "a", console)
    lines = [line.strip() for line in console.export_text().splitlines()]
    assert " ".join(next(line for line in lines if line.startswith("cell")).split()) == titles
    left_out = [name for name in ("syncs", "runs", "difference") if name not in titles]
    assert not left_out or f"a wider terminal also shows {', '.join(left_out)}" in " ".join(lines)
    assert max(map(len, lines)) <= width


def test_a_run_is_a_whole_line_in_a_narrow_terminal(study: Path) -> None:
    console = Console(record=True, width=60, file=io.StringIO())
    show_runs(str(study.parent), console)
    names = {line.split()[0] for line in console.export_text().splitlines() if line.strip()}
    assert names >= {f"mine/{path.parent.name}" for path in study.glob("*/config.json")}
    assert "…" not in console.export_text()


def test_columns_that_are_not_always_shown_are_left_out_first() -> None:
    console = Console(record=True, width=24, file=io.StringIO(), force_terminal=True)
    row = [Entry(text) for text in ("J = 1", "50.00", "12.00", "2 of 2")]
    show_table(TextTable("", ["cell", "final", "worst client", "runs"], [row]), console)
    text = console.export_text()
    assert text.split()[:3] == ["cell", "final", "runs"]
    assert "also shows worst client" in " ".join(text.split())
