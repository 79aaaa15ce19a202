from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from fedsim.config import Value
from fedsim.data.datasets import training_images
from fedsim.errors import UserError
from fedsim.experiments.study import TWIN, read_study, study_names
from fedsim.optim.lr_schedule import schedule_of
from fedsim.training.run_plan import run_plan

HEAD = 'title = "a"\nmode = "localsgd"\n'


def cells_of(name: str) -> dict[tuple[Value, ...], int]:
    """How many seeds each place has."""
    counts: dict[tuple[Value, ...], int] = {}
    for cell in read_study(name).cells():
        counts[cell.place] = counts.get(cell.place, 0) + 1
    return counts


@pytest.mark.parametrize(
    ("name", "cells", "seeds"),
    [
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
    ],
)
def test_a_study_has_its_cells_each_with_every_seed_and_a_name_of_its_own(name: str, cells: int, seeds: int) -> None:
    assert sorted(set(cells_of(name).values())) == [seeds]
    assert len(cells_of(name)) == cells
    names = [cell.config.name for cell in read_study(name).cells()]
    assert len(set(names)) == len(names) == cells * seeds
    assert {cell.config.seed for cell in read_study(name).cells([7])} == {7}


def test_every_study_is_listed_above() -> None:
    listed = next(m for m in test_a_study_has_its_cells_each_with_every_seed_and_a_name_of_its_own.pytestmark)  # type: ignore[attr-defined]
    assert sorted(case[0] for case in listed.args[1]) == study_names()


def test_a_twin_takes_the_samples_and_the_rate_of_its_column() -> None:
    for name in ("kj-equal-epochs", "kj-small"):
        cells = read_study(name).cells([1])
        twins = {cell.place[0]: cell.config for cell in cells if cell.place[1] == TWIN}
        assert {cell.mode for cell in cells if cell.place[1] == TWIN} == {"centralized"}
        for cell in cells:
            if cell.mode == "localsgd":
                own, twin = cell.config, twins[cell.config.clients]
                assert twin.batch_size == own.clients * own.batch_size
                assert twin.epochs == own.epochs
                of_twin = schedule_of(twin, Fraction(50_000, twin.batch_size), twin.epochs)
                assert run_plan(own, training_images(own)).lr.peak == pytest.approx(of_twin.peak)
                assert of_twin.peak == pytest.approx(0.01 * own.clients)


def test_table2_bn_differs_from_table2_in_the_batchnorm_alone() -> None:
    for one, other in zip(read_study("table2").cells(), read_study("table2-bn").cells(), strict=True):
        assert one.config.changed({"batchnorm-at-sync": "average"}) == other.config
        assert one.config.batchnorm_at_sync == "worker-0"


def test_table1_scaled_scales_as_the_text_says() -> None:
    for cell in read_study("table1-scaled").cells([1]):
        peak = schedule_of(cell.config, Fraction(10), 100).peak
        ratio = cell.config.batch_size / 256
        assert peak == pytest.approx(0.01 * (ratio if cell.place[0] == "linear" else ratio**0.5))
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[set]\nlocal-step = 3", "mine.toml: unknown key local-step: did you mean local-steps?"),
        ("[grid]\nlocal-step = [3]", "mine.toml: unknown key local-step: did you mean local-steps?"),
        ("[[case]]\nwhen = {lrr = [1.0]}\nset = {}", "mine.toml: unknown key lrr: did you mean lr?"),
        ("[[case]]\nwhen = {lr = [1.0]}\nset = {lrr = 1.0}", "mine.toml: unknown key lrr: did you mean lr?"),
        ("[[case]]\nset = {lr = 1.0}", "mine.toml: a [[case]] has a table when and a table set"),
        ("[grid]\nclients = 4", "mine.toml: grid clients = 4 is no list: for instance clients = [4]"),
        ("[grid]\nclients = [4, 0]", "mine.toml: clients = 0 is out of range"),
        ("[grid]\nclients = ['x']", "mine.toml: clients = 'x' is not a whole number"),
        ("twin = true", "mine.toml: unknown entry twin: it must be one of title, mode, twins"),
        ("twins = 1", "mine.toml: twins = 1 is not true or false"),
        ("twins = true\n[grid]\nlr = [1.0]", "mine.toml: twins = true needs a grid of clients and local-steps"),
        (
            "compare = 'table9'",
            "mine.toml: compare = 'table9' is no table of the paper: it must be one of table1, table2",
        ),
        ("set = 3", "mine.toml: set = 3 is no table"),
        ("= 3", "mine.toml is no TOML"),
    ],
)
def test_what_a_file_gets_wrong_is_one_line_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(HEAD + text)
    with pytest.raises(UserError) as caught:
        read_study(str(path))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("head", "message"), [('title = "a"', "mode is missing"), ('title = "a"\nmode = "x"', "mode = 'x'")]
)
def test_a_study_says_what_it_is(tmp_path: Path, head: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(head)
    with pytest.raises(UserError, match=message):
        read_study(str(path))
