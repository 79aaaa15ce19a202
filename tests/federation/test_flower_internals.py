"""What is not Flower's public API is used in two files alone, so that a new version of Flower changes these."""

from __future__ import annotations

import re
from pathlib import Path

import fedsim
import strategies

PRIVATE = re.compile(r"flwr\.(supercore|common|superlink|supernode)|__dict__\[\"_|_construct_messages")


def test_two_files_name_what_flower_keeps_to_itself() -> None:
    folders = [Path(package.__file__ or "").parent for package in (fedsim, strategies)]
    files = [file for folder in folders for file in folder.rglob("*.py") if PRIVATE.search(file.read_text())]
    assert sorted(file.name for file in files) == ["flower_internals.py", "private_superlink.py"]
