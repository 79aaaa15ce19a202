from __future__ import annotations

import re
import tomllib
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsim.config import Value
from fedsim.config.options import StudyOptions
from fedsim.errors import UserError
from fedsim.experiments.study import FOLDER, LARGE_BATCH, Study, read_study, study_names
from fedsim.optim.lr_schedule import schedule_of
from fedsim.training.run_plan import run_plan

HEAD = 'title = "a"\nmode = "localsgd"\n'


def written(folder: Path, text: str) -> Study:
    """The study of this text, in the file mine.toml."""
    (folder / "mine.toml").write_text(text)
    return read_study(str(folder / "mine.toml"))


def cells_of(name: str) -> dict[tuple[Value, ...], int]:
    """The number of seeds of each cell."""
    counts: dict[tuple[Value, ...], int] = {}
    for cell in read_study(name).cells():
        counts[cell.coords] = counts.get(cell.coords, 0) + 1
    return counts


@pytest.mark.parametrize(
    ("name", "cells", "seeds"),
    [
        ("demo", 9, 1),
        ("table1", 18, 3),
        ("table1-scaled", 12, 3),
        ("table2", 6, 3),
        ("table2-bn", 6, 3),
        ("kj-equal-epochs", 6 * 7 + 6, 3),
        ("kj-small", 3 * 4 + 3, 2),
        ("kj-rate", 15, 1),
        ("momentum", 9, 3),
        ("scaled-small", 8, 3),
        ("precision", 2, 3),
        ("precision-tf32", 2, 3),
        ("kj-small-tuned", 2 * 4 + 2, 3),
        ("kj-tuned", 2 * 4 + 2, 3),
        ("methods-outer", 6, 3),
        ("methods-fedadam", 2, 3),
        ("methods-post-local", 2, 3),
        ("methods-qsr", 2, 3),
        ("methods-optimizer", 4, 3),
        ("methods-compress", 6, 3),
        ("batchnorm", 12, 3),
        ("fedopt", 3, 1),
        ("diloco-text", 5, 1),
        ("diloco-text-outer", 4, 1),
        ("frontier", 22, 1),
    ],
)
def test_a_study_has_its_cells_each_with_every_seed_and_a_name_of_its_own(name: str, cells: int, seeds: int) -> None:
    counts = cells_of(name)
    assert set(counts.values()) == {seeds}
    assert len(counts) == cells
    names = [cell.config.name for cell in read_study(name).cells()]
    assert len(set(names)) == len(names) == cells * seeds
    assert {cell.config.seed for cell in read_study(name).cells([7])} == {7}


def test_every_study_is_listed_above() -> None:
    listed = next(m for m in test_a_study_has_its_cells_each_with_every_seed_and_a_name_of_its_own.pytestmark)  # type: ignore[attr-defined]
    assert sorted(case[0] for case in listed.args[1]) == study_names()


def test_a_baseline_has_the_samples_and_the_rate_of_its_column() -> None:
    for name in ("kj-equal-epochs", "kj-small"):
        cells = read_study(name).cells([1])
        baselines = {cell.coords[0]: cell.config for cell in cells if cell.coords[1] == LARGE_BATCH}
        assert {cell.mode for cell in cells if cell.coords[1] == LARGE_BATCH} == {"centralized"}
        for cell in cells:
            if cell.mode == "localsgd":
                own, baseline = cell.config, baselines[cell.config.clients]
                assert baseline.batch_size == own.clients * own.batch_size
                assert baseline.epochs == own.epochs
                of_baseline = schedule_of(baseline, Fraction(50_000, baseline.batch_size), baseline.epochs)
                peak, peak_of_baseline = (max(map(lr, range(5000))) for lr in (run_plan(own).lr, of_baseline))
                assert peak == pytest.approx(peak_of_baseline)
                assert peak_of_baseline == pytest.approx(0.01 * own.clients)


def test_table2_bn_differs_from_table2_in_the_batchnorm_alone() -> None:
    for one, other in zip(read_study("table2").cells(), read_study("table2-bn").cells(), strict=True):
        assert one.config.changed({"batchnorm-at-sync": "average"}) == other.config
        assert one.config.batchnorm_at_sync == "first-worker"


def test_table1_scaled_scales_as_the_text_says() -> None:
    for cell in read_study("table1-scaled").cells([1]):
        peak = max(map(schedule_of(cell.config, Fraction(10), 100), range(1000)))
        ratio = cell.config.batch_size / 256
        assert peak == pytest.approx(0.01 * (ratio if cell.coords[0] == "linear:batch=256" else ratio**0.5))
        assert (cell.config.warmup_epochs, cell.config.schedule) == (5.0, "cosine")


def test_only_the_study_that_chooses_a_rate_tests_on_validation_images() -> None:
    held = {name: {cell.config.validation for cell in read_study(name).cells()} for name in study_names()}
    assert held == {name: {5000} if name == "kj-rate" else {0} for name in study_names()}


def test_a_file_of_ones_own_is_a_study(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        HEAD + "[grid]\nlr = [0.1, 0.2]\n[set]\nclients = 2\n[[case]]\nwhen = {lr = [0.2]}\nset = {clients = 3}"
    )
    study = read_study(str(path))
    assert [(c.config.name, c.config.lr, c.config.clients) for c in study.cells()] == [
        ("lr0.1-seed2025", 0.1, 2),
        ("lr0.2-seed2025", 0.2, 3),
    ]


@pytest.mark.parametrize("name", study_names())
def test_a_study_is_read_back_as_it_was_written(name: str, tmp_path: Path) -> None:
    study = read_study(name)
    assert tomllib.loads(study.toml) == tomllib.loads((FOLDER / f"{name}.toml").read_text())
    (tmp_path / name).mkdir()
    (tmp_path / name / "study.toml").write_text(study.toml)
    assert read_study(str(tmp_path / name / "study.toml")) == study


@pytest.mark.parametrize("name", ["table1", "table1-scaled", "table2"])
def test_a_study_in_bf16_is_the_one_kept_beside_the_runs_in_results(name: str) -> None:
    kept = FOLDER.parents[1] / "results" / f"{name}-bf16" / "study.toml"
    if not kept.exists():
        pytest.skip("no results beside this installation")
    now, then = read_study(name).in_precision("bf16"), read_study(str(kept))
    assert now.cells() == then.cells()
    assert now.tune == then.tune


def test_every_study_that_leaves_its_precision_open_can_be_run_in_bf16() -> None:
    for study in map(read_study, study_names()):
        if "precision" not in study.grid:
            cells = study.in_precision("bf16").cells([1])
            assert [cell.config.precision for cell in cells] == ["bf16"] * len(cells)
            assert [cell.config.changed({"precision": "fp32"}) for cell in cells] == [
                c.config for c in study.cells([1])
            ]


@pytest.mark.parametrize(
    "text",
    [
        '[set]\nprecision = "fp64"',
        '[grid]\nprecision = ["fp32"]',
        '[[case]]\nwhen = {optimizer = ["sgdm"]}\nset = {precision = "bf16"}',
    ],
)
def test_a_study_that_sets_its_precision_keeps_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="mine: the study sets its precision itself"):
        written(tmp_path, HEAD + text).in_precision("bf16")


def test_an_unknown_precision_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="precision = 'half' is unknown"):
        written(tmp_path, HEAD).in_precision("half")


TWINS = HEAD + "twins = true\n[grid]\nclients = [2]\nlocal-steps = %s\n[set]\nbatch-size = 50\n%s"


def test_the_baseline_of_a_budget_in_rounds_has_the_samples_of_its_column(tmp_path: Path) -> None:
    """50 rounds of 20 steps of 2 workers at batch 50 are 2 epochs of 50,000 images; the key epochs has no effect."""
    (cell, baseline) = written(tmp_path, TWINS % ("[20]", "rounds = 50\nepochs = 7.0")).cells()
    plan = run_plan(cell.config)
    assert (baseline.config.epochs, baseline.config.batch_size) == (2.0, 100)
    assert plan.first_step(plan.rounds + 1) * baseline.config.batch_size == baseline.config.epochs * 50_000


def test_the_baseline_of_sampled_clients_has_the_batch_of_a_round(tmp_path: Path) -> None:
    (_, baseline) = written(tmp_path, TWINS % ("[20]", "fraction = 0.5\nrounds = 100")).cells()
    assert (baseline.config.epochs, baseline.config.batch_size) == (2.0, 50)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            TWINS % ("[10, 20]", "rounds = 50"),
            "twins = true: clients = 2 has cells with epochs = 1.0 and 2.0, but one baseline: give them the same, "
            "a budget in epochs instead of rounds",
        ),
        (
            TWINS % ("[20]", "rounds = 60"),
            "twins = true: clients = 2 trains for 2.4 epochs, but a baseline needs whole ones",
        ),
        (TWINS % ("[20]", "epochs = 2.5"), "twins = true: clients = 2 trains for 2.5 epochs"),
        (
            TWINS % ("[10, 20]", "[[case]]\nwhen = {local-steps = [20]}\nset = {lr = 0.02}"),
            "twins = true: clients = 2 has cells with lr = 0.01 and 0.02, but one baseline",
        ),
        ((TWINS % ("[20]", "")).replace("localsgd", "centralized"), "grid clients: results of mode centralized do not"),
    ],
)
def test_a_column_without_one_baseline_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        written(tmp_path, text)
    assert str(caught.value).startswith(f"mine.toml: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[set]\nlocal-step = 3", "mine.toml: unknown key local-step: did you mean local-steps?"),
        ("[grid]\nlocal-step = [3]", "mine.toml: unknown key local-step: did you mean local-steps?"),
        ("[[case]]\nwhen = {lrr = [1.0]}\nset = {}", "mine.toml: unknown key lrr: did you mean lr?"),
        ("[[case]]\nwhen = {lr = [1.0]}\nset = {lrr = 1.0}", "mine.toml: unknown key lrr: did you mean lr?"),
        ("[[case]]\nset = {lr = 1.0}", "mine.toml: case 0 when is missing"),
        ("[[case]]\nwhen = 3\nset = {lr = 1.0}", "mine.toml: case 0 when = 3 is not a table"),
        ("[[case]]\nwhen = {lr = [1.0]}\nset = {lr = 2.0}\nif = 3", "mine.toml: case 0 if is unknown"),
        ("case = 3", "mine.toml: case = 3 is not a list"),
        ("[grid]\nclients = 4", "mine.toml: grid clients = 4 is not a list: for instance [4]"),
        ("[grid]\nclients = []", "mine.toml: clients = [] is empty: give it one value or more"),
        ("[grid]\nlr = [1, 1.0]", "mine.toml: lr = [1.0, 1.0] has 1.0 twice: leave one of them out"),
        ("[grid]\nclients = [[4]]", "mine.toml: clients = [4] is not a whole number"),
        ("[grid]\ndata-dir = ['a', 'b']", "mine.toml: grid data-dir: results of mode localsgd do not depend on it"),
        ("[set]\nname = 'a'", "mine.toml: set name: a study cannot set it"),
        ("[set]\nlr = 2020-02-02", "mine.toml: lr = datetime.date(2020, 2, 2) is not a number"),
        (f"[set]\nlr = 1{'0' * 400}", "mine.toml: lr = inf is out of range"),
        ("name = 'a'", "mine.toml: unknown entry name"),
        ("compare = 3", "mine.toml: compare = 3 is not text"),
        ("[grid]\nclients = [4, 0]", "mine.toml: clients = 0 is out of range"),
        ("[grid]\nclients = ['x']", "mine.toml: clients = 'x' is not a whole number"),
        ("twin = true", "mine.toml: unknown entry twin: it must be one of title, mode, question"),
        ("twins = 1", "mine.toml: twins = 1 is not true or false"),
        ("twins = true\n[grid]\nlr = [1.0]", "mine.toml: twins = true needs mode localsgd and a grid of clients"),
        (
            "compare = 'table9'",
            "mine.toml: compare = 'table9' is not a table of the paper: it must be one of table1, table2",
        ),
        ("set = 3", "mine.toml: set = 3 is not a table"),
        ("= 3", "mine.toml is not TOML in UTF-8: "),
        (f"[set]\nlr = 1{'0' * 5000}", "mine.toml is not TOML in UTF-8: "),
        (f"set = {'[' * 2000}", "mine.toml is not TOML in UTF-8: "),
    ],
)
def test_what_a_file_gets_wrong_is_one_line_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        written(tmp_path, HEAD + text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ('title = "a"', "mode is missing"),
        ('mode = "localsgd"', "title is missing"),
        ('title = "a"\nmode = "x"', "mode = 'x': Input should be 'centralized' or 'localsgd'"),
        ('title = 3\nmode = "localsgd"', "title = 3 is not text"),
    ],
)
def test_a_study_says_what_it_is(tmp_path: Path, head: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^mine.toml: {message}"):
        written(tmp_path, head)


def test_every_cell_is_run_once_more_with_the_keys_of_each_also(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('title = "a"\nmode = "localsgd"\n[grid]\nclients = [2, 4]\n[set]\nouter = "slowmo:lr=0.5"\n')
    study = read_study(str(path)).with_also(["outer=diloco", "local-rule=scaffold momentum=0"])
    path.write_text(study.toml)
    assert read_study(str(path)) == study
    assert (study.axes, study.compared) == (("method", "clients"), "method")
    assert [(cell.name, *cell.coords, cell.config.outer, cell.config.momentum) for cell in study.cells()] == [
        ("k2", "as set", 2, "slowmo:lr=0.5", 0.9),
        ("k4", "as set", 4, "slowmo:lr=0.5", 0.9),
        ("k2-diloco", "outer=diloco", 2, "diloco", 0.9),
        ("k4-diloco", "outer=diloco", 4, "diloco", 0.9),
        ("k2-scaffold-momentum0.0", "local-rule=scaffold momentum=0.0", 2, "slowmo:lr=0.5", 0.0),
        ("k4-scaffold-momentum0.0", "local-rule=scaffold momentum=0.0", 4, "slowmo:lr=0.5", 0.0),
    ]
    for text, message in (
        ("outer", "also = 'outer' is not KEY=VALUE, several with spaces between: for instance outer=diloco"),
        ("clients=3", "also clients: it is a key of the study's own grid: leave it out of one of them"),
        ("outr=3", "unknown key outr: did you mean outer?"),
        ("outer=diloco outer=slowmo", "gives a key twice: give each value an --also of its own"),
        ("seed=3", "also seed: it cannot be changed: give --seeds"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            read_study(str(path)).with_also([text])
    with pytest.raises(UserError, match="also outer=diloco: it is there twice"):
        study.with_also(["outer=diloco"])


def test_in_python_a_list_is_a_list_or_a_value() -> None:
    lists = {"also": ["outer=diloco"], "seeds": [1, 2], "cells": ["k4-*"]}
    options = StudyOptions.of(lists)
    assert (options.also, options.seeds, options.cells) == (("outer=diloco",), (1, 2), ("k4-*",))
    values = StudyOptions.of({"also": "outer=diloco momentum=0", "seeds": 3, "cells": "k4-*,k12-*"})
    assert (values.also, values.seeds, values.cells) == (("outer=diloco momentum=0",), (3,), ("k4-*", "k12-*"))


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes('title = "é"'.encode("latin-1"))
    (tmp_path / "folder.toml").mkdir()
    for name, message in (
        ("a/b", "unknown study a/b: it must be one of batchnorm, demo, "),
        (str(tmp_path), f"unknown study {tmp_path}: "),
        (f"{tmp_path}/none.toml", f"{tmp_path}/none.toml cannot be read (No such file or directory)"),
        (f"{tmp_path}/folder.toml", f"{tmp_path}/folder.toml cannot be read (Is a directory)"),
        (f"{tmp_path}/latin.toml", "latin.toml is not TOML in UTF-8: "),
    ):
        with pytest.raises(UserError) as caught:
            read_study(name)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


VALUES: dict[str, st.SearchStrategy[Any]] = {  # what keys accept
    "lr": st.floats(0.001, 1.0),
    "clients": st.integers(1, 2**40),
    "local-steps": st.integers(1, 9),
    "rounds": st.integers(0, 2**63 - 1),
    "schedule": st.sampled_from(["constant", "multistep:milestones=50/60"]),
    "optimizer.nesterov": st.booleans(),
    "optimizer": st.sampled_from(["sgdm", "lars", "lamb"]),
    "seed": st.integers(0, 9),
}
LISTS = st.fixed_dictionaries(
    {}, optional={name: st.lists(v, min_size=1, max_size=2, unique=True) for name, v in VALUES.items()}
)
SETTINGS = st.fixed_dictionaries({}, optional=VALUES)
STUDIES = st.fixed_dictionaries(
    {"title": st.text(st.characters(codec="utf-8"), max_size=3), "mode": st.sampled_from(["localsgd", "centralized"])},
    optional={
        "twins": st.booleans(),
        "compare": st.sampled_from(["", "table2"]),
        "grid": LISTS,
        "set": SETTINGS,
        "case": st.lists(st.fixed_dictionaries({"when": LISTS, "set": SETTINGS}), max_size=2),
        "tune": st.fixed_dictionaries(
            {"validation": st.integers(-1, 2**40), "grid": LISTS},
            optional={"budget": st.floats(), "seed": st.integers()},
        ),
    },
)
NAMES = st.sampled_from([*VALUES, "name", "Lr\n", "", "when", "set"])
SCALARS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.sampled_from(["", "a\nb"]) | st.dates()
ANY = st.recursive(SCALARS, lambda v: st.lists(v, max_size=2) | st.dictionaries(NAMES, v, max_size=2), max_leaves=4)
FAULTS = st.dictionaries(
    st.sampled_from(["title", "mode", "twins", "compare", "grid", "set", "case", "tune", "chosen", "name", "Set\n"]),
    st.dictionaries(NAMES, ANY, max_size=2) | st.lists(st.dictionaries(NAMES, ANY), max_size=2) | ANY,
    max_size=1,
)


@settings(deadline=None, derandomize=True, max_examples=150, suppress_health_check=list(HealthCheck))
@given(STUDIES, FAULTS)
def test_any_toml_is_a_study_or_one_line(fuzzed: Path, entries: dict[str, Any], faults: dict[str, Any]) -> None:
    path = fuzzed / "mine.toml"
    path.write_text(tomli_w.dumps({**entries, **faults}))
    wrong = ""
    try:
        study = read_study(str(path))
    except UserError as error:
        wrong = str(error)
    if wrong:
        assert wrong.startswith("mine.toml")
        assert len(wrong.splitlines()) == 1
    else:
        path.write_text(study.toml)
        assert read_study(str(path)).cells() == study.cells() != []


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")
