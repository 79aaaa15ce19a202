"""Any keys, flags and values give a configuration or one line of error, never a traceback."""

from __future__ import annotations

import contextlib
import gc
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsim.cli import main
from fedsim.cli.commands import cli
from fedsim.config import FIELDS, Config, typed
from fedsim.errors import UserError
from strategies.arguments import kebab
from tests.conftest import TIMES

fuzz = settings(derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module", autouse=True)
def no_callback_left() -> Iterator[None]:
    """Hypothesis leaves a Python callback in every garbage collection, also in those of later tests' threads."""
    before = list(gc.callbacks)
    yield
    gc.callbacks[:] = before


def changed(keys: dict[str, Any]) -> tuple[Config | None, str]:
    """The configuration, or why there is none."""
    try:
        return Config().changed(keys), ""
    except UserError as error:
        return None, str(error)


@given(
    st.dictionaries(
        st.sampled_from([kebab(name) for name in FIELDS]) | st.text(max_size=12),
        st.one_of(
            st.text(),
            st.text("0123456789+-.eE_nai\u00b2\u0664 ", max_size=12),
            st.integers(),
            st.integers(3900, 4500).map("1".__mul__),
            st.integers(300, 6000).map(lambda digits: 10**digits),
            st.floats(),
            st.booleans(),
            st.sampled_from(["synthetic", "lars", "lamb", "cosine", "cuda:1", "50,60", "true", "~", "~root", "1e400"]),
            st.lists(st.integers(), max_size=2),
            st.none(),
        ),
        max_size=4,
    )
)
@settings(fuzz, max_examples=100 * TIMES)
def test_any_keys_give_a_configuration_or_one_line(keys: dict[str, Any]) -> None:
    """And a configuration is what its keys, its identity and its text say."""
    config, error = changed(keys)
    if config is None:
        assert error.isprintable()  # a line break is not
        assert error
        return
    assert Config().changed(config.as_keys()) == config
    as_text = {
        name: str(value).lower() if type(value) is bool else str(value) for name, value in config.as_keys().items()
    }
    assert Config().changed(as_text) == config
    assert all(typed(name, value) == value for name, value in config.as_keys().items())


COMMANDS = cli.commands
NO_DATA = ["--dataset", "cifar100", "--data-dir", "damaged"]  # the last of a flag wins: no training begins
ENDING = {
    "centralized": NO_DATA,
    "localsgd": NO_DATA,
    "grid": NO_DATA,
    "demo": ["--results-dir", ""],
    "bench": ["--clients", "2", "--batch-size", "1000000"],
    "paper": NO_DATA[2:],
    "export-shards": NO_DATA,
    "partition": NO_DATA,
    "deploy": ["--nodes", "0"],
}
WORDS = st.one_of(
    st.text(st.characters(blacklist_characters="\0/~"), max_size=8),  # other folders than the test's are let be
    st.text("0123456789+-.eE,_nai\u00b2", max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.integers(300, 6000).map("9".__mul__),
    st.characters(categories=["Cs"]),
    st.sampled_from(
        ["synthetic", "stacked", "table1", "kj-small", "[/b]", "1e400", "1Mbit", "1ms", "auto", "damaged", "\x1b["]
    ),
)


@st.composite
def arguments(draw: st.DrawFn) -> list[str]:
    """A command, some of its flags or of what looks like flags, and what keeps it from beginning."""
    name = draw(st.sampled_from([*COMMANDS]))
    flags = [flag for parameter in COMMANDS[name].params for flag in parameter.opts if flag.startswith("-")] or [
        "--help"
    ]
    given_flags = draw(st.lists(st.tuples(st.sampled_from(flags) | WORDS, WORDS), max_size=4))
    return [name, *(word for pair in given_flags for word in pair), *ENDING.get(name, [])]


@given(arguments())
@settings(fuzz, max_examples=50 * TIMES)
def test_any_flags_give_one_line_and_an_exit_code(tmp_path_factory: pytest.TempPathFactory, given: list[str]) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    (folder / "damaged" / "cifar-100-python").mkdir(parents=True, exist_ok=True)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setattr(sys, "argv", ["run.py", *given])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as end:
                code = int(end.code or 0)
    assert code in (0, 1, 2)
    if code:
        assert err.getvalue().startswith("error: ")
        assert err.getvalue()[:-1].isprintable()
        assert err.getvalue().endswith("\n")
    assert {path.name for path in Path(folder).iterdir()} <= {"damaged", "report"}
