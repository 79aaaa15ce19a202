"""The wheel, installed in an environment of its own and used outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests.conftest import assert_same_bits, final_model, rows_of

ROOT = Path(__file__).parents[1]
TINY = (
    "--dataset synthetic:images=96 --model lenet-bn --batch-size 8 --clients 2 --local-steps 2 --rounds 2 --threads 1"
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout. To build it, pip needs the build backend from a package index."""
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel and the installed packages, but neither Flower's nor pip's."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, symlinks=True)
    paths = sysconfig.get_paths("venv", {"base": str(environment)})
    pip = [sys.executable, "-m", "pip", "--python", f"{paths['scripts']}/python"]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    # Python does not read the .pth files in that folder, such as the one that leads to this checkout
    (Path(paths["purelib"]) / "installed.pth").write_text(sysconfig.get_path("purelib"))
    return Path(paths["scripts"])


def fedsim(programs: Path, folder: Path, command: str, code: int = 0) -> str:
    """Run a command of the installed fedsim in `folder`; returns what it printed. PATH has no other environment."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["PATH"] = f"{programs}{os.pathsep}{os.defpath}"
    done = subprocess.run(
        [programs / "fedsim", *command.split()], cwd=folder, env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_wheel_has_every_file_of_the_packages_and_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "fedsim", "strategies"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {name for name in names if ".dist-info/" not in name} == set(tracked)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_commands_work_outside_the_checkout(programs: Path, tmp_path: Path) -> None:
    where = subprocess.run(
        [programs / "python", "-c", "import fedsim, strategies; print(fedsim.__file__, strategies.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert all(Path(file).is_relative_to(programs.parent) for file in where)
    assert "topk" in fedsim(programs, tmp_path, "list compress")
    assert "kj-small: " in fedsim(programs, tmp_path, "study")
    fedsim(programs, tmp_path, "study demo --dry-run")
    assert not any(tmp_path.iterdir())
    assert "K = 4, J = 25" in fedsim(programs, tmp_path, "demo")
    assert [path.name for path in tmp_path.iterdir()] == ["demo-results"]
    fedsim(programs, tmp_path, f"grid {TINY.replace('--local-steps 2', '--local-steps 2,3')} --name own")
    text = "--dataset text:context=8 --model gpt-tiny:layers=1,width=8,heads=2 --optimizer adamw --clients 2 --rounds 1"
    assert "bits per byte" in fedsim(programs, tmp_path, f"localsgd {text}")
    fedsim(programs, tmp_path, "report")
    assert "own" in (tmp_path / "report/index.html").read_text()


def test_the_engine_flower_needs_its_commands_and_equals_local(programs: Path, tmp_path: Path) -> None:
    """The app that Flower runs is a copy of the installed packages."""
    flower = f"localsgd {TINY} --name flower --engine flower"
    (error,) = fedsim(programs, tmp_path, flower, code=2).splitlines()
    assert error.startswith("error: engine = flower needs the command flwr, which is neither in ")
    assert not any(tmp_path.iterdir())
    for command in entry_points(group="console_scripts"):
        if command.name.startswith(("flwr", "flower")):
            script = programs / command.name
            main = f"from {command.module} import {command.attr}\nif __name__ == '__main__':\n    {command.attr}()\n"
            script.write_text(f"#!{programs}/python\n{main}")
            script.chmod(0o755)
    fedsim(programs, tmp_path, flower)
    fedsim(programs, tmp_path, f"localsgd {TINY} --name local")
    ours, theirs = tmp_path / "results/local", tmp_path / "results/flower"
    assert rows_of(ours) == rows_of(theirs)
    assert_same_bits(final_model(ours), final_model(theirs))
