"""Run the code of a page of the documentation as its reader would: from top to bottom, in one shell."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.commands import forked

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?:`([\w.]+)`:\n\n)?```(sh|python|toml)\n(.*?)```", re.DOTALL)
PROGRAMS = """
set -euo pipefail
asked() {  # have a command run with this folder and this PYTHONPATH, and print what it printed
    printf '%s\\0' "$PWD" "$PYTHONPATH" "$@" > "$TALK/ask"
    local code
    read -r code < "$TALK/answer"
    cat "$TALK/output"
    return "$code"
}
fedsim() { asked fedsim "$@"; }
python() { asked python "$@"; }
torchrun() { "$PYTHON" -m torch.distributed.run "$@"; }
"""


def read_page(name: str) -> str:
    """The text of a page in docs/."""
    return (ROOT / "docs" / name).read_text()


def run_page(name: str, folder: Path) -> str:
    """Run the blocks of a page with `folder` as working directory, on the CPU; returns what they print.

    A block below a file's name, as in ```name.py`:``, becomes that file. Other blocks are commands (sh) or programs
    (python).
    """
    script, programs = PROGRAMS, 0
    for file, language, code in BLOCK.findall(read_page(name)):
        if language == "python" and not file:
            programs += 1
            script += f"cat > program-{programs}.py <<'END'\n{code}END\npython program-{programs}.py\n"
        else:
            script += f"cat > {file} <<'END'\n{code}END\n" if file else code
    with tempfile.TemporaryDirectory() as talk, serving(Path(talk)):
        environment = {**os.environ, "PYTHONPATH": "", "TALK": talk, "PYTHON": sys.executable}
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
        )
    assert done.returncode == 0, done.stdout
    assert "Warning" not in done.stdout, done.stdout
    return done.stdout


@contextlib.contextmanager
def serving(talk: Path) -> Iterator[None]:
    """Context manager: run the commands that the page's shell asks for, each in a forked process."""
    for name in ("ask", "answer"):
        os.mkfifo(talk / name)

    def serve() -> None:
        while words := (talk / "ask").read_text().split("\0")[:-1]:
            place, modules, program, *arguments = words
            env = {"PYTHONPATH": modules, "CUDA_VISIBLE_DEVICES": "", "FEDSIM_CORES": "1"}
            with forked(_run, program, arguments, folder=Path(place), **env) as command:
                with contextlib.suppress(AssertionError):  # it takes too long
                    command.wait()
                (talk / "output").write_text(command.stdout + command.stderr)
                (talk / "answer").write_text("0\n" if command.returncode == 0 else "1\n")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        (talk / "ask").write_text("")
        thread.join()


def _run(program: str, arguments: list[str]) -> None:
    """``fedsim`` with `arguments`, or ``python FILE``."""
    if program == "fedsim":
        sys.argv = ["fedsim", *arguments]
        runpy.run_module("fedsim", run_name="__main__")
    else:
        sys.argv = arguments
        sys.path.insert(0, os.getcwd())
        runpy.run_path(arguments[0], run_name="__main__")
