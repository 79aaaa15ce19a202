"""The origin of a result: date, host, device, commit, command and versions."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from fedsim import __version__

PACKAGES = ("flwr", "torch", "torchvision", "torch-optimizer", "numpy")


def provenance(device: str) -> dict[str, Any]:
    """What summaries and benchmark files record of their origin."""
    cpu = platform.processor() or platform.machine()
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "host": platform.node(),
        "device": f"{device} ({name})",
        **(json.loads(os.environ.get("FEDSIM_ORIGIN", "null")) or origin()),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of Python, fedsim and the packages that it computes with."""
    found = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"python": platform.python_version(), "fedsim": __version__, **found}


def origin() -> dict[str, str]:
    """The commit of the checkout and the command of this process; child processes get both by FEDSIM_ORIGIN."""
    return {"commit": _commit(), "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}


def program() -> str:
    """The command by which the user started this program: ``fedsim``, ``python -m fedsim`` or ``python run.py``."""
    start = Path(sys.argv[0])
    if start.name == "__main__.py":
        return f"python -m {start.parent.name}"
    return f"python {start.name}" if start.suffix == ".py" else start.name


def _commit() -> str:
    """The checkout's commit, with + where files differ from it; empty outside a checkout."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():  # installed, perhaps inside another project's checkout
        return ""
    git = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
