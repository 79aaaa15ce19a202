"""Presets: named settings from ``fedsim/studies/*.toml``, filled in below the flags that were given.

A file holds a table ``[set]`` and any number of ``[[case]]``, each with a table ``when`` (key -> the values it
applies to) and a table ``set``; later cases win over earlier ones, and explicit flags over all.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.config import Config
from fedsim.errors import UserError

FOLDER = Path(__file__).with_name("studies")


def configure(explicit: Mapping[str, Any], preset: str = "") -> Config:
    """The defaults, changed by the preset, changed by the `explicit` keys (kebab-case)."""
    Config().changed(explicit)  # what was given is checked before a preset chooses by it
    if not preset:
        return Config().changed(explicit)
    study = _read(preset)
    config = Config().changed({**study["set"], **explicit})
    settings: dict[str, Any] = dict(study["set"])
    for case in study.get("case", []):
        if all(config.as_keys()[name] in values for name, values in case["when"].items()):
            settings |= case["set"]
    if "epochs" in explicit:
        settings.pop("rounds", None)  # a budget in epochs replaces the preset's budget in rounds
    return Config().changed({**settings, **explicit})


def _read(preset: str) -> dict[str, Any]:
    path = FOLDER / f"{preset}.toml"
    if path.parent != FOLDER or not path.is_file():
        names = ", ".join(sorted(file.stem for file in FOLDER.glob("*.toml")))
        raise UserError(f"unknown preset {preset}: it must be one of {names}")
    return tomllib.loads(path.read_text())
