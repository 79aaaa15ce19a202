"""Where the files of data sets are."""

from __future__ import annotations

import os
from pathlib import Path

from fedsim.config import Config
from fedsim.data.cache import user_cache
from fedsim.errors import UserError
from fedsim.registry import is_own


def data_folder(config: Config) -> Path:
    """The folder of the data set's files: the key data-dir, FEDSIM_DATA, or the user's cache."""
    named = config.data_dir or os.environ.get("FEDSIM_DATA") or user_cache()
    try:
        return Path(named).expanduser().absolute()
    except RuntimeError as error:  # ~user
        raise UserError(f"data-dir = {named}: there is no such user: give another folder") from error


def located(dataset: str, name: str, folder: str) -> Path:
    """The file or folder `name` of a data set; a relative one is in `folder` or the working directory."""
    places = [Path(folder) / Path(name).expanduser(), Path(name).expanduser().absolute()]
    for place in places:
        if place.exists():
            return place
    parents = dict.fromkeys(str(place.parent) for place in places)  # both are one where `name` is absolute
    raise UserError(f"dataset = {dataset}: there is no such file in {' nor in '.join(parents)}")


def absolute_data_dir(config: Config) -> str:
    """The key data-dir with which a process that works in another folder finds the data of `config`."""
    folder, named = data_folder(config), config.data_dir or os.environ.get("FEDSIM_DATA", "")
    name = _named(config)
    if name and located(config.dataset, name, str(folder)) != folder / Path(name).expanduser():
        return str(Path.cwd())
    return config.data_dir if not named or Path(named).is_absolute() else str(folder)


def _named(config: Config) -> str:
    """The file or folder that the key dataset names; empty where it names none."""
    if config.dataset.endswith(".npz"):
        return config.dataset
    arguments = {} if is_own(config.dataset) else config.choice("dataset").arguments
    return str(arguments.get("path", ""))
