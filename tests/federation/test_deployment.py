"""The app as a federation of processes that speak TLS and prove who they are: as deployed, on loopback."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import fedsim
from fedsim.deploy.files import Federation, deploy
from fedsim.federation.flwr_run import copy_app, free_port
from fedsim.runs.records import read_rows
from tests.conftest import METHODS, NEEDS_FLWR_DATASETS, RESNET, SMALL, TEXT, assert_same_bits, final_model, rows_of
from tests.federation.processes import BIN, JOINED, Running, client_environment, running, started

pytestmark = pytest.mark.deployment

NODES = 2


class Deployed(NamedTuple):
    """A run by a federation: its configuration, and the command that streams its log."""

    keys: dict[str, Any]
    command: subprocess.Popen[str]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A SuperLink and SuperNodes, each with its own shard and its own key."""
    with running(tmp_path_factory.mktemp("deployment") / "federation", NODES) as started:
        yield started


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, federation: Running) -> Iterator[Deployed]:
    """A run of the federation, which goes on while nodes and clients that are refused try to get in."""
    keys = {**SMALL, "rounds": 2, "compress-down": "topk"}
    with begun(federation, tmp_path_factory.mktemp("deployed"), keys) as run:
        yield run


@pytest.fixture(scope="module")
def of_three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Another one, of as many nodes as every method needs."""
    with running(tmp_path_factory.mktemp("three") / "federation", nodes=3) as started:
        yield started


@pytest.fixture(scope="module")
def open_door(tmp_path_factory: pytest.TempPathFactory, federation: Running) -> Path:
    """The folder of an insecure federation for the same SuperLink."""
    out = tmp_path_factory.mktemp("open") / "federation"
    deploy(Federation(1, port=federation.port, insecure=True), out)
    return out


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory, federation: Running) -> Path:
    """Another federation's folder for the same SuperLink: its authority and its keys are not this one's."""
    out = tmp_path_factory.mktemp("strangers") / "federation"
    deploy(Federation(1, port=federation.port), out)
    return out


def copied(federation: Running, folder: Path) -> Path:
    """A copy of node 0 with another port of its own; returns its script."""
    script = shutil.copytree(federation.folder / "nodes" / "0", folder) / "node.sh"
    script.write_text(re.sub(r"--port \d+", f"--port {free_port()}", script.read_text()))
    return script


def refused(script: Path, words: str) -> None:
    """Start a node that must end by itself, with `words` in its log, without having joined."""
    with started(script, script.with_name("refused.log")) as node:
        assert node.process.wait(60) == 1, node.says()
        assert words in node.says()
        assert JOINED not in node.says()


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {**SMALL, "rounds": 2, "fraction": 0.67, "compress-down": "topk"},  # two of three clients
        pytest.param(RESNET, marks=NEEDS_FLWR_DATASETS),
        *({**SMALL, **keys} for keys in [TEXT, *METHODS.values()]),
    ],
    ids=["sample", "resnet18", "text", *METHODS],
)
def test_a_federation_of_every_method_is_the_run_in_this_process_bitwise(
    of_three: Running, tmp_path: Path, keys: dict[str, Any]
) -> None:
    with begun(of_three, tmp_path, keys) as run:
        assert_as_in_this_process(run)


@contextlib.contextmanager
def begun(federation: Running, folder: Path, keys: dict[str, Any]) -> Iterator[Deployed]:
    """A run by `federation` that has begun; its results lie in `folder`."""
    keys = {**keys, "clients": len(federation.nodes), "results-dir": str(folder), "name": "deployed"}
    overrides = " ".join(f"{name}={json.dumps(value)}" for name, value in keys.items())
    command = [f"{BIN}/flwr", "run", str(copy_app(folder / "app")), "federation", "--stream", "-c", overrides]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=federation.env, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield Deployed(keys, process)
        finally:
            process.kill()


def assert_as_in_this_process(deployed: Deployed) -> None:
    """The same run deployed and in this process: models, rows, and all bytes that were sent."""
    log, _ = deployed.command.communicate(timeout=400)
    keys, folder = deployed.keys, Path(deployed.keys["results-dir"])
    assert (folder / "deployed" / "summary.json").exists(), log
    asked = {name.replace("-", "_"): value for name, value in keys.items() if name != "epochs"}
    here = fedsim.localsgd(**{**asked, "name": "here"}, progress=False)  # by the engine that it has by default
    assert rows_of(here.folder)[-1]["round"] == keys["rounds"]
    assert rows_of(folder / "deployed") == rows_of(here.folder)
    sent = [
        [(row["bytes_up"], row["bytes_down"], row["overhead_bytes_up"], row["overhead_bytes_down"]) for row in rows]
        for rows in (read_rows(folder / "deployed"), read_rows(here.folder))
    ]
    assert sent[0] == sent[1]
    assert_same_bits(final_model(folder / "deployed"), final_model(here.folder))


@pytest.mark.usefixtures("deployed")
def test_a_node_that_trusts_another_authority_does_not_connect(
    federation: Running, strangers: Path, tmp_path: Path
) -> None:
    script = copied(federation, tmp_path / "node")
    shutil.copy(strangers / "nodes" / "0" / "ca.crt", script.parent)
    refused(script, "CERTIFICATE_VERIFY_FAILED")


@pytest.mark.usefixtures("deployed")
def test_a_node_in_plain_text_never_gets_in(federation: Running, open_door: Path, tmp_path: Path) -> None:
    """Flower's SuperNode tries again for ever."""
    script = copied(replace(federation, folder=open_door), tmp_path / "node")
    with started(script, tmp_path / "node.log") as node:
        node.wait_for("Connection attempt failed", times=2)
        assert JOINED not in node.says()


@pytest.mark.usefixtures("deployed")
def test_clients_in_plain_text_or_of_another_authority_are_refused(
    federation: Running, open_door: Path, strangers: Path
) -> None:
    for client in (open_door / "client", strangers / "client"):
        done = replace(federation, env=client_environment(client)).flwr("list", "federation", seconds=60)
        assert done.returncode == 1
        assert "Connection to the SuperLink is unavailable" in done.stdout


def test_a_federation_of_processes_is_the_run_in_this_process_bitwise(deployed: Deployed) -> None:
    assert_as_in_this_process(deployed)


def test_a_node_is_refused_until_its_key_is_registered(federation: Running, strangers: Path, tmp_path: Path) -> None:
    script = copied(federation, tmp_path / "node")
    shutil.copy(strangers / "nodes" / "0" / "node.key", script.parent)
    refused(script, "[code: 2004] Failed to activate SuperNode")
    client = shutil.copytree(federation.folder / "client", tmp_path / "client")
    (client / "keys" / "node-1.pub").unlink()
    shutil.copy(strangers / "client" / "keys" / "node-0.pub", client / "keys" / f"node-{NODES}.pub")
    command = ["bash", str(client / "register.sh")]
    done = subprocess.run(command, env=federation.env, stdout=subprocess.PIPE, text=True, timeout=120)
    assert done.stdout.splitlines() == [
        "keys/node-0.pub: registered before",
        f"keys/node-{NODES}.pub: registered",
    ]
    with started(script, tmp_path / "accepted.log") as node:
        node.wait_for(JOINED)


@pytest.mark.slow
def test_an_insecure_federation_needs_no_keys(tmp_path: Path) -> None:
    with running(tmp_path / "open", nodes=1, insecure=True) as federation:
        assert "online" in federation.flwr("supernode", "list", "federation").stdout
