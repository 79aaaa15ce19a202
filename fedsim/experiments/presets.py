"""Presets: the settings of a study, filled in below the flags that were given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.experiments.study import read_study, study_names


def configure(explicit: Mapping[str, Any], preset: str = "") -> Config:
    """The defaults, changed by the preset, changed by the `explicit` keys (kebab-case)."""
    config = Config().changed(explicit)  # what was given is checked before a preset chooses by it
    if not preset:
        return config
    if preset not in study_names():
        raise UserError(f"unknown preset {preset}: it must be one of {', '.join(study_names())}")
    return read_study(preset).configure(explicit)
