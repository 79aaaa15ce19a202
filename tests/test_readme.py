from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.reference import average, local_sgd
from tests.commands import forked

ROOT = Path(__file__).parents[1]
COLUMNS = ("test_clients", "test_per_class_accuracy")  # of rows, whose names begin as those of tests do


def program_of(page: str) -> str:
    """The first block of Python in a page."""
    (program, *_) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return str(program)


def test_the_readme_fits_on_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_the_algorithm_in_the_docs_is_the_reference() -> None:
    """Bit for bit, with BatchNorm and momentum."""
    K, J, rounds, generator = 3, 2, 3, torch.Generator().manual_seed(0)
    images = torch.randn(K, J * rounds, 4, 3, 8, 8, generator=generator)
    labels = torch.randint(10, (K, J * rounds, 4), generator=generator)

    def batch(worker: int, step: int) -> tuple[Tensor, Tensor]:
        return images[worker, step], labels[worker, step]

    def sgdm(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    expected = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    model = copy.deepcopy(expected)
    local_sgd(expected, sgdm, batch, workers=K, local_steps=[J] * rounds)
    workers = [(replica, sgdm(replica)) for replica in (copy.deepcopy(model) for _ in range(K))]
    names = {"model": model, "workers": workers, "batch": batch, "rounds": rounds, "J": J, "F": F, "mean": average}
    exec(program_of("docs/algorithms.md"), names)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


def test_the_program_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSIM_CORES", "1")
    names: dict[str, Any] = {}
    exec(program_of("README.md"), names)
    assert len(names["run"].rows) > 1
    assert sorted(set(names["found"].runs["lr"])) == [0.01, 0.1]


def test_every_part_of_fedsim_and_every_page_is_named() -> None:
    readme = (ROOT / "README.md").read_text()
    design = (ROOT / "docs/design.md").read_text()
    built = design[design.index("## How it is built") :]
    for part in (ROOT / "fedsim").iterdir():
        if not part.name.startswith(("__", ".")):
            assert f"{part.name}/`" in built or f"{part.name}`" in built, part.name
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in readme, page.name


@pytest.mark.skipif(importlib.util.find_spec("pdoc") is None, reason="needs pdoc: pip install fedsim[docs]")
def test_the_reference_is_made_of_the_docstrings(tmp_path: Path) -> None:
    (command,) = re.findall(r"```sh\npdoc (.*)\n```", (ROOT / "docs/python.md").read_text())
    with forked(_pdoc, command.split(), folder=tmp_path) as process:
        done = process.wait()
    assert done.returncode == 0, done.stderr
    pages = [(tmp_path / "reference" / name).read_text() for name in ("fedsim/api.html", "strategies.html")]
    assert "compress_down = " in pages[0]  # a key of `localsgd`
    assert "LocalSGD" in pages[1]


def _pdoc(arguments: list[str]) -> None:
    from pdoc.__main__ import cli as pdoc

    pdoc(arguments)


def test_links_of_the_readme_and_docs_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_file_and_test_that_a_page_names_is_there() -> None:
    tests = set(re.findall(r"^def (test_\w+)", "".join(f.read_text() for f in (ROOT / "tests").rglob("*.py")), re.M))
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for file in re.findall(r"`((?:fedsim|strategies|tests)/[\w/]*(?:\.\w+)?)`", page.read_text()):
            assert (ROOT / file).exists(), f"{page.name}: {file}"
        named = set(re.findall(r"`(test_\w+_\w+)(?:\[[^`]*\])?`", page.read_text()))
        missing = {name for name in named - tests if not name.startswith(COLUMNS)}
        assert not missing, f"{page.name}: {missing}"
