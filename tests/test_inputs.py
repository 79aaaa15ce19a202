"""A run is of one data set and one code: in every process, after a resume, and where it is shown again."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedsim.config import Config, Mode
from fedsim.data import datasets, image_sets, own_arrays
from fedsim.data.datasets import digests_of, load_dataset
from fedsim.device import resolve
from fedsim.errors import UserError
from fedsim.experiments.execute import execute
from fedsim.federation import client_app, server_app
from fedsim.federation.in_process import InProcessGrid
from fedsim.federation.protocol import shared
from fedsim.own_code import own_code
from fedsim.runs.checkpoint_file import seal, serialize
from fedsim.runs.records import read_summary
from fedsim.runs.run import Run
from tests.conftest import Execute, assert_same_bits, final_model
from tests.own_code import arrays

MODES: tuple[Mode, ...] = ("localsgd", "centralized")
MODEL = """
from torch import nn
import shape_of_my_net

def build(classes, image):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape_of_my_net.inputs(*image), 8), nn.ReLU(), nn.Linear(8, classes))
"""
SHAPE = "def inputs(c, h, w):\n    return c * h * w\n"


def as_in_a_new_process() -> None:
    """Forget the data sets and the code that this process has read."""
    of_images = (image_sets._whole, image_sets._own_facts, image_sets._of_function, image_sets._version_read)
    for read in (*of_images, datasets._hold_out, own_arrays.first_returned, own_arrays.names_of):
        read.cache_clear()
    for name in ("shape_of_my_net", "my_net"):
        sys.modules.pop(name, None)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def refused(attempt: Callable[[], object], folder: Path) -> str:
    """The message of the UserError that it raises; nothing in `folder` changes."""
    before = contents(folder)
    with pytest.raises(UserError) as caught:
        attempt()
    assert contents(folder) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(file: Path, **changes: np.ndarray) -> None:
    np.savez(file, **{**arrays(), **changes})  # type: ignore[arg-type]
    as_in_a_new_process()


OTHER: list[tuple[str, Callable[[np.ndarray], np.ndarray]]] = [
    ("train_labels", lambda labels: labels[::-1]),
    ("test_labels", lambda labels: 2 - labels),
    ("train_images", lambda images: images ^ (np.arange(images.size).reshape(images.shape) == 7)),
    ("test_images", lambda images: images[::-1]),
]


@pytest.mark.parametrize(("name", "other"), OTHER, ids=[name for name, _ in OTHER])
@pytest.mark.parametrize("mode", MODES)
def test_a_run_is_not_resumed_nor_shown_with_other_data(
    run: Execute, tmp_path: Path, mode: Mode, name: str, other: Callable[[np.ndarray], np.ndarray]
) -> None:
    file = tmp_path / "mine.npz"
    keys: dict[str, Any] = {"dataset": str(file), "model": "tests.own_code:mlp", "batch_size": 8, "name": "run"}
    write(file)
    folder = run(mode, **keys, stop_after_epochs=1.0).folder
    for _ in range(2):  # first half of it, then all
        write(file, **{name: other(arrays()[name])})
        words = f"name = run: the {name} of dataset = {file} have changed since the run was trained: restore them, give"
        assert refused(lambda: run(mode, **keys), folder).startswith(words)
        write(file)
        assert run(mode, **keys).finished
    assert (read_summary(folder) or {})["data"] == digests_of(Config(dataset=str(file)))


@pytest.fixture
def my_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a model of the user's own, in two modules."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_net.py").write_text(MODEL)
    (tmp_path / "code" / "shape_of_my_net.py").write_text(SHAPE)
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    as_in_a_new_process()
    return tmp_path / "code"


@pytest.mark.parametrize("file", ["my_net.py", "shape_of_my_net.py"])
@pytest.mark.parametrize("mode", MODES)
def test_changed_code_resumes_a_run_only_where_it_is_accepted(
    run: Execute, my_net: Path, mode: Mode, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    keys: dict[str, Any] = {"model": "my_net:build", "name": "run", "checkpoint_every": 1}
    folder = run(mode, **keys, stop_after_epochs=1.0).folder
    done = (read_summary(folder) or {})["round"]
    (my_net / file).write_text((my_net / file).read_text().replace("ReLU", "Tanh") + "\n")
    as_in_a_new_process()
    changed = f"name = run: {file} has changed since the run was trained"
    words = f"{changed}: restore it, or give --accept-changed-code to use it as it is now, --rerun to"
    assert refused(lambda: run(mode, **keys), folder).startswith(words)
    capsys.readouterr()
    assert run(mode, **keys, accept_changed_code=True).finished
    assert capsys.readouterr().err == f"warning: {changed}\n"
    summary = read_summary(folder) or {}
    assert summary["code_changed_after"] == [done]
    assert summary["code"] == own_code(Config(model="my_net:build"))
    assert run(mode, **keys).finished
    (my_net / file).write_text((my_net / file).read_text() + "\n")
    as_in_a_new_process()
    assert refused(lambda: run(mode, **keys), folder).startswith(changed)
    assert run(mode, **keys, accept_changed_code=True).finished


def test_the_server_app_accepts_changed_code_too(run: Execute, small: Config, my_net: Path) -> None:
    folder = run(model="my_net:build", name="run", stop_after_rounds=1).folder
    (my_net / "my_net.py").write_text(MODEL.replace("ReLU", "Tanh"))
    as_in_a_new_process()
    config = resolve(small.changed({"model": "my_net:build", "name": "run"}), "localsgd")

    def as_flower_does(config: Config) -> None:
        with InProcessGrid(client_app.app, config) as grid:
            server_app.main(grid, Context(1, 1, {}, RecordDict(), dict(config.as_keys())))

    assert "my_net.py has changed" in refused(lambda: as_flower_does(config), folder)
    assert "my_net.py has changed" in refused(lambda: execute(config, "localsgd", "flower"), folder)
    as_flower_does(config.changed({"accept-changed-code": True}))
    assert (read_summary(folder) or {})["code_changed_after"] == [1]


def rewrite(path: Path, **changes: Any) -> None:
    """Replace these entries of a checkpoint; None removes one."""
    state = {**torch.load(path, weights_only=True), **changes}
    content = serialize({name: value for name, value in state.items() if value is not None})
    path.write_bytes(content + seal(content))


def test_a_record_of_before_has_nothing_to_compare(run: Execute, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(name="whole")
    part = run(name="part", stop_after_rounds=2)
    rewrite(part.folder / "checkpoint.pt", data=None, code=None, versions=None)
    assert_same_bits(final_model(run(name="part")), final_model(whole))
    summary = part.folder / "summary.json"
    held = json.loads(summary.read_text())
    summary.write_text(json.dumps({name: held[name] for name in held if name not in ("data", "code", "sha256")}))
    assert run(name="part").finished
    assert capsys.readouterr().err == ""


def test_another_version_of_a_package_is_one_line(run: Execute, capsys: pytest.CaptureFixture[str]) -> None:
    path = run(name="part", stop_after_rounds=2).folder / "checkpoint.pt"
    versions = torch.load(path, weights_only=True)["versions"]
    assert {"python", "torch", "torchvision", "numpy", "flwr"} <= versions.keys()
    rewrite(path, versions={**versions, "torch": "1.0", "numpy": "0.9"})
    assert run(name="part").finished
    assert capsys.readouterr().err == "warning: name = part: its checkpoint is of other versions: numpy, torch\n"


def answered(config: Config, **node_config: Any) -> RecordDict:
    """The reply of a node to the question which shard it holds."""
    context = Context(1, 2, {"partition-id": 0, "num-partitions": 4, **node_config}, RecordDict(), {})
    with InProcessGrid(client_app.app, config):  # within a run, where messages can be made
        message = Message(RecordDict({"config": ConfigRecord({**shared(config)})}), 2, "query.partition")
    return client_app.partition(message, context).content


def test_a_node_says_which_data_and_code_it_has(small: Config, tmp_path: Path, my_net: Path) -> None:
    write(tmp_path / "mine.npz")
    (tmp_path / "node").mkdir()
    write(tmp_path / "node" / "mine.npz", train_labels=arrays()["train_labels"][::-1])
    keys = {"dataset": "mine.npz", "model": "my_net:build", "outer": "no.such:Strategy", "data-dir": str(tmp_path)}
    config = small.changed({**keys, "batch-size": 8})
    own, other = (answered(config, **{"data-dir": str(place)}) for place in (tmp_path, tmp_path / "node"))
    assert dict(own.config_records["data"]) == digests_of(config)
    data, others = own.config_records["data"], other.config_records["data"]
    assert [name for name in data if data[name] != others[name]] == ["train_labels"]
    assert set(own.config_records["code"]) == {"my_net.py", "shape_of_my_net.py"}
    with pytest.raises(UserError, match=r"unseeded gives other train_images, train_labels when it is called again"):
        answered(config.changed({"dataset": "tests.own_code:unseeded"}))


def test_a_run_is_refused_where_a_node_has_other_labels(small: Config, tmp_path: Path) -> None:
    write(tmp_path / "mine.npz")
    (tmp_path / "node").mkdir()
    write(tmp_path / "node" / "mine.npz", train_labels=arrays()["train_labels"][::-1])
    keys = {"dataset": "mine.npz", "data-dir": str(tmp_path), "model": "tests.own_code:mlp", "batch-size": 8}
    config = resolve(small.changed({**keys, "name": "run"}), "localsgd")
    with InProcessGrid(client_app.app, config) as grid:
        grid._contexts[4].node_config["data-dir"] = str(tmp_path / "node")
        with pytest.raises(UserError, match=r"Left out: the node with partition-id 2 has other train_labels"):
            server_app.train_localsgd(grid, config, Run(config, "localsgd"))


def test_digests_are_of_values_and_shapes_whatever_border_and_split(small: Config, tmp_path: Path) -> None:
    write(tmp_path / "mine.npz")
    config = small.changed({"dataset": str(tmp_path / "mine.npz"), "batch-size": 8})
    digests = digests_of(config)
    assert len(set(digests.values())) == 4
    for keys in ({"augment.padding": 0}, {"validation": 8}, {"augment.size": 8}):
        assert digests_of(config.changed(keys)) == digests
    held = arrays()
    write(tmp_path / "mine.npz", **{name: held[name].swapaxes(1, 2) for name in ("train_images", "test_images")})
    assert digests_of(config)["train_images"] != digests["train_images"]


def test_a_file_that_is_written_again_needs_another_process(small: Config, tmp_path: Path) -> None:
    """In a notebook, a second run would train on the images that the first one has read."""
    write(file := tmp_path / "mine.npz")
    config = small.changed({"dataset": str(file), "batch-size": 8})
    load_dataset(config)
    np.savez(file, **arrays())  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"mine.npz has changed since this process read it: start another process"):
        load_dataset(config)
    as_in_a_new_process()
    load_dataset(config)


def test_the_files_of_code_are_those_that_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "mine/__init__.py": "",
        "mine/nets/__init__.py": "from .layers import norm",
        "mine/nets/layers.py": "import numpy\nfrom .. import sizes\ndef norm(): pass",
        "mine/nets/small.py": "def build(classes):\n    from beside import deep as net\n    import fedsim.config",
        "mine/sizes.py": "def rare():\n    import mine.rare",
        "mine/rare.py": "this is no Python",
        "mine/other.py": "import mine",
        "beside/__init__.py": "",
        "beside/deep.py": "from torch import nn",
        "beside/unused.py": "",
        "fedsim/config.py": "",
    }
    for name, text in files.items():
        (tmp_path / "site-packages" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site-packages" / name).write_text(text)
    of_mine = ["__init__", "nets/__init__", "nets/layers", "nets/small", "rare", "sizes"]
    expected = [f"mine/{name}.py" for name in of_mine]
    for folder, others in (("site-packages", []), ("code", ["beside/__init__.py", "beside/deep.py"])):
        (tmp_path / "site-packages").replace(tmp_path / folder)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "dont_write_bytecode", True)
            patch.setattr(sys, "path", [str(tmp_path / folder), *sys.path])
            assert list(own_code(Config(model="mine.nets.small:build"))) == [*others, *expected]
        for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
            del sys.modules[name]
        importlib.invalidate_caches()
    (tmp_path / "other.py").write_text("def build(classes): ...")
    spec = importlib.util.spec_from_file_location("of_another_name", tmp_path / "other.py")
    assert spec
    assert spec.loader
    monkeypatch.setitem(sys.modules, "of_another_name", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules["of_another_name"])
    assert list(own_code(Config(model="of_another_name:build"))) == ["other.py"]
    assert own_code(Config(model="torchvision.models:resnet18", outer="flwr.serverapp.strategy:FedAdam")) == {}
