"""Run the code of a page of the documentation as its reader would: from top to bottom, in one shell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?:`([\w.]+)`:\n\n)?```(sh|python|toml)\n(.*?)```", re.DOTALL)
PROGRAMS = f"""
set -euo pipefail
python() {{ PYTHONPATH="$PYTHONPATH:{ROOT}" "{sys.executable}" "$@"; }}
fedsim() {{ python -P -m fedsim "$@"; }}
"""


def read_page(name: str) -> str:
    """The text of a page in docs/."""
    return (ROOT / "docs" / name).read_text()


def run_page(name: str, folder: Path) -> str:
    """Run the blocks of a page with `folder` as working directory, on the CPU; returns what they print.

    A block below a file's name, as in ```name.py`:``, becomes that file. Other blocks are commands (sh) or programs
    (python).
    """
    script = PROGRAMS
    for file, language, code in BLOCK.findall(read_page(name)):
        if file:
            script += f"cat > {file} <<'END'\n{code}END\n"
        else:
            script += code if language == "sh" else f"python - <<'END'\n{code}END\n"
    environment = {**os.environ, "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": "", "FEDSIM_CORES": "1"}
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
