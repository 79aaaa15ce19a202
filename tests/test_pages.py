"""Each block of code in the README and docs is run by a test, or shown to be of a kind that needs no running here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsim.cli.commands import cli
from fedsim.cli.flags import Command, several
from fedsim.config import FIELDS, typed
from fedsim.experiments.study import read_study
from strategies.arguments import kebab
from tests.conftest import Call
from tests.pages import ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
WHOLE = {  # pages that a test runs from top to bottom
    "tutorial.md": "test_tutorial.py",
    "your-method.md": "test_your_method.py",
    "models-and-data.md": "test_models_and_data.py",
    "torch-distributed.md": "test_torch_distributed.py",
    "six-ways.md": "test_six_ways.py",
}
PROGRAMS = {  # pages whose programs a test runs -> how many these are
    "README.md": 1,  # tests/test_readme.py
    "algorithms.md": 1,  # tests/test_readme.py
    "python.md": 5,  # here
}
OTHERS = {  # what else a command begins with, and where it is run or why not
    "python3": "installs: .ci/run",
    ".": "what was installed, or written by deploy: tests/deploy",
    "federation/": "what deploy has written: tests/deploy",
    "flwr": "tests/federation/test_flwr_run.py and tests/deploy; its keys are checked here",
    "flower-supernode": "a line of what deploy has written: tests/deploy",
    "pdoc": "tests/test_readme.py",
    "pytest": "the suite itself",
    "export": "a setting of Flower's",
    "sudo": "systemd: tests/deploy checks the units",
    "cp": "of certificates between machines",
    "docker": "another image",
    "ray": "a cluster of several machines",
    "nsys": "NVIDIA's profiler",
}
OF_RECORDS = ("compare", "diff", "runs", "time-to-accuracy")  # commands that read what is in results/


def blocks(page: Path) -> list[tuple[str, str]]:
    """The language and the code of each block of a page."""
    return re.findall(r"```(\w*)\n(.*?)```", page.read_text(), re.DOTALL)


def lines() -> Iterator[tuple[str, str]]:
    """The name of a page and a line of a shell, of all that stand in a block; what is read from here is left out."""
    for page in PAGES:
        for language, code in blocks(page):
            if language in ("sh", "bash"):
                code = re.sub(r"<<'END'.*?\nEND\n", "\n", code, flags=re.DOTALL)
                code = re.sub(r"'[^']*'", lambda quoted: quoted[0].replace("\n", " "), code)
                yield from ((page.name, line) for line in code.replace("\\\n", " ").splitlines())


def commands() -> Iterator[list[str]]:
    """The words of each command of fedsim after its first."""
    for _, line in lines():
        if found := re.search(r"(?:^|&& |\s)(?:\S*bin/)?(?:fedsim|\S*python run\.py) (\w.*)", line):
            yield shlex.split(found[1], comments=True)


def test_each_block_is_run_or_of_a_kind_that_needs_no_running() -> None:
    for page in PAGES:
        languages = [language for language, _ in blocks(page)]
        assert set(languages) <= {"sh", "bash", "python", "toml", "text"}, page.name
        if page.name in WHOLE:
            assert f'run_page("{page.name}"' in (ROOT / "tests" / WHOLE[page.name]).read_text()
        else:
            assert languages.count("python") == PROGRAMS.get(page.name, 0), page.name
            assert page.name == "studies.md" or "toml" not in languages
    for name, line in lines():
        if name not in WHOLE and not re.search(r"(^|\s|&& |/)(fedsim|\S*python run\.py) \w", line):
            first = line.partition("=")[2].partition(" ")[2] if re.match(r"[A-Z_]+=", line) else line
            assert first.startswith(tuple(OTHERS)), f"{name}: {line}"


def test_the_programs_of_the_page_on_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSIM_CORES", "1")
    names: dict[str, Any] = {"__name__": "page"}
    for language, code in blocks(ROOT / "docs/python.md"):
        if language == "python":
            exec(code, names)
    assert len(names["found"].runs) == 4
    assert names["chain"].config["compress"] == "topk:ratio=0.1+int8"
    assert {run.name for run in Path("results").iterdir()} >= {"rates", names["run"].folder.name}


def test_the_studies_of_the_page_on_studies_are_read(tmp_path: Path) -> None:
    whole, *parts = [code for language, code in blocks(ROOT / "docs/studies.md") if language == "toml"]
    for number, code in enumerate([whole, *(f'title = "a"\nmode = "localsgd"\n{part}' for part in parts)]):
        (file := tmp_path / f"{number}.toml").write_text(code)
        assert read_study(str(file)).cells()


def test_the_values_of_each_command_are_accepted() -> None:
    checked = 0
    for name, *arguments in commands():
        command = cli.commands[name]
        assert isinstance(command, Command)
        if {"--help", "--help-all"} & {*arguments}:
            continue
        found = command.make_context(name, arguments).params
        given = {key: value for key, value in found.items() if value is not None}
        command.options.of({key: value for key, value in given.items() if key in command.options.model_fields})
        for key in (key for key in command.options.key_flags() if key in given):
            if not several(kebab(key), given[key]):
                typed(kebab(key), given[key])
        checked += len(given)
    assert checked > 100


def test_the_keys_given_to_flower_are_keys() -> None:
    given = [found for _, line in lines() for found in re.findall(r'^flwr run .* -c "([^"]*)"', line)]
    assert given
    for name, _, value in (pair.partition("=") for text in given for pair in shlex.split(text)):
        assert name.replace("-", "_") in FIELDS
        typed(name, value)


def test_commands_that_read_the_results_of_the_repository_run(call: Call, tmp_path: Path) -> None:
    (tmp_path / "results").symlink_to(ROOT / "results")
    run = [words for words in commands() if words[0] in OF_RECORDS and Path(words[1]).exists()]
    assert {words[0] for words in run} == {*OF_RECORDS}
    for words in run:
        code, out, err = call(*words)
        assert (code, err) == (0, ""), words
        assert out
