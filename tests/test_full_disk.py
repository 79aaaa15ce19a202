"""Every command that writes, where no file may grow: one line and an exit code, never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedsim.config import Config
from fedsim.device import resolve
from fedsim.experiments.execute import execute
from tests.conftest import SMALL

ROOT = Path(__file__).parents[1]
RUN = "--dataset synthetic:images=64 --model lenet5 --batch-size 16 --clients 1 --local-steps 2 --epochs 1 --device cpu"
STUDY = """
title = "Tiny"
mode = "localsgd"
grid = {clients = [1]}
set = {dataset = "synthetic:images=64", model = "lenet5", batch-size = 16, epochs = 1.0}
"""
COMMANDS = [
    f"localsgd {RUN}",
    "centralized --dataset synthetic:images=64 --model lenet5 --batch-size 16 --epochs 1 --device cpu",
    f"grid {RUN}",
    "study tiny.toml --device cpu",
    "demo",
    "report finished -o new/report",
    "time-to-accuracy finished --bandwidth 1Mbit --latency 1ms --target 0.001 -o new/times",
    "bench --device cpu -o new/bench.json",
    "deploy --nodes 2 -o new/federation",
    "export-shards --dataset synthetic:images=64 --clients 2 -o new/shards",
]
# In one process, which imports torch once: RLIMIT_FSIZE lets files be made, but not be written to
SCRIPT = """
import contextlib, io, json, resource, sys, tempfile
from fedsim import cli

tempfile.gettempdir()  # looked for while files can be written
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
for command in json.loads(sys.argv[1]):
    sys.argv = ["run.py", *command.split()]
    errors, code = io.StringIO(), 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            errors.write(f"raised {error!r}")
    print(json.dumps([command, code, errors.getvalue()]))
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(STUDY)
    finished = Config().changed({**SMALL, "rounds": 1, "results-dir": str(tmp_path / "finished"), "name": "run"})
    execute(resolve(finished, "localsgd"), "localsgd")
    script = [sys.executable, "-c", SCRIPT, json.dumps(COMMANDS)]
    environment = {
        "PYTHONPATH": str(ROOT),
        "PATH": "/usr/bin:/bin",
        "XDG_CACHE_HOME": str(tmp_path),
        "HOME": str(tmp_path),
    }
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert [command for command, _, _ in outcomes] == COMMANDS
    for command, code, errors in outcomes:
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert code in (1, 2), (command, code, errors)
        assert len(lines) == 1, (command, errors)
        # A new process may look for its temporary folder, by a file that it writes there
        reasons = ("File too large", "No usable temporary directory")
        assert any(reason in lines[0] for reason in reasons), (command, errors)
        assert "Traceback" not in errors, (command, errors)
    written = {path.name for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size}
    assert not {"index.html", "bench.json", "images.npy", "study.toml", "superlink.sh"} & written
