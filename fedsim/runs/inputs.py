"""What a run is made from besides its keys: its data set and the user's own code, by digests, and package versions.

They are in each checkpoint and in the summary, and compared where the run is resumed or shown again. Records of older
versions have none: then nothing is compared.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.config import Config
from fedsim.data.datasets import digests_of
from fedsim.errors import UserError
from fedsim.own_code import own_code
from fedsim.registry import failures_of
from fedsim.system.files import read_file
from fedsim.system.provenance import versions

Inputs = dict[str, dict[str, str]]
INIT = "init"  # the name of that file among the digests of data
SHOWN = 4  # names in a message


def inputs_of(config: Config) -> Inputs:
    """The digests of the data set, of the file `init` and of the code that `config` names, and the versions here."""
    data = digests_of(config)
    if config.init:
        with failures_of(f"init = {config.init} cannot be read", remedy="restore it"):
            data = {**data, INIT: hashlib.sha256(read_file(Path(config.init))).hexdigest()}
    return {"data": data, "code": own_code(config), "versions": versions()}


def check_inputs(config: Config, name: str, held: Mapping[str, Any], own: Inputs) -> bool:
    """Compare the inputs `held` in a record of the run `name` with its `own` inputs now; returns whether code differs.

    Raises UserError where the data differs, and where the code does, unless the key accept-changed-code allows it.
    """
    if changed := differing(held.get("data"), own["data"]):
        of_data, of_init = f"the {changed} of dataset = {config.dataset}", f"the weights of init = {config.init}"
        what = of_init if changed == INIT else of_data
        raise UserError(
            f"name = {name}: {what} have changed since the run was trained: "
            "restore them, give --rerun to run it again, or another --name"
        )
    if not (changed := differing(held.get("code"), own["code"])):
        return False
    if not config.accept_changed_code:
        raise UserError(
            f"name = {name}: {changed} has changed since the run was trained: restore it, or give "
            "--accept-changed-code to use it as it is now, --rerun to run it again, or another --name"
        )
    print(f"warning: name = {name}: {changed} has changed since the run was trained", file=sys.stderr)
    return True


def warn_of_versions(name: str, held: Mapping[str, Any], own: Inputs) -> None:
    """Warn on one line where the run `name` was trained so far with other versions of packages."""
    if changed := differing(held.get("versions"), own["versions"]):
        print(f"warning: name = {name}: its checkpoint is of other versions: {changed}", file=sys.stderr)


def check_own_data(worker: str, held: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Raise UserError where a node has other images of its `own` than it had in the run before; none: the run's."""
    if changed := differing(held, own):
        raise UserError(
            f"the {changed} of the node with partition-id {worker} have changed since the run began: restore them, or "
            "start another run"
        )


def differing(held: object, own: Mapping[str, str]) -> str:
    """The first names with different values, as text; empty if there are none, or if nothing is held."""
    if not isinstance(held, dict):
        return ""
    held = {str(name): value for name, value in held.items()}  # a checkpoint may hold anything
    names = [name for name in sorted(held.keys() | own.keys()) if held.get(name) != own.get(name)]
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
