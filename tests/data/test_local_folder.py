"""Nodes with their own images: federations in this process in which each client has a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedsim.config import Config, own_keys
from fedsim.data.image_sets import load_images
from fedsim.data.local_folder import own_images, write_shards
from fedsim.device import resolve
from fedsim.errors import UserError
from fedsim.experiments.execute import execute
from fedsim.federation import client_app
from fedsim.federation.in_process import InProcessGrid
from fedsim.federation.protocol import shared
from fedsim.federation.server_app import train_localsgd
from fedsim.models import build_model
from fedsim.runs.records import read_summary
from fedsim.runs.run import Run
from tests.conftest import SMALL_BATCHNORM, assert_same_bits, final_model, rows_of


def with_folders(config: Config, folders: Path, replies: list[Message] | None = None) -> Run:
    """A run of `config` whose client k has the folder `folders`/k; what the clients reply is put in `replies`."""

    def client(message: Message, context: Context) -> Message:
        reply = client_app.app(message, context)
        if replies is not None:
            replies.append(Message(RecordDict(dict(reply.content)), reply_to=message))  # the server takes from it
        return reply

    run = Run(config, "localsgd")
    with InProcessGrid(client, config) as grid:  # type: ignore[arg-type]
        for context in grid._contexts.values():
            context.node_config["data-dir"] = str(folders / str(context.node_config["partition-id"]))
        train_localsgd(grid, config, run)
    return run


@pytest.fixture
def shards(small: Config, tmp_path: Path) -> Path:
    write_shards(small, tmp_path / "shards")
    return tmp_path / "shards"


def folder_of(pixels: np.ndarray, labels: np.ndarray, folder: Path) -> Path:
    """A folder of these images and labels."""
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", pixels)
    np.save(folder / "labels.npy", labels)
    return folder


@pytest.mark.parametrize(
    "keys", [{}, {"shuffle-every": "round", "validation": 64, "clients": 3, "model": SMALL_BATCHNORM}]
)
def test_nodes_with_their_own_folders_train_as_by_partition_id_bitwise(
    small: Config, tmp_path: Path, keys: dict[str, Any]
) -> None:
    config = resolve(small.changed({"rounds": 5, **keys}), "localsgd")
    write_shards(config, tmp_path / "shards")
    own = with_folders(config.changed({"name": "own"}), tmp_path / "shards")
    shared = execute(config.changed({"name": "shared"}), "localsgd")
    assert_same_bits(final_model(own), final_model(shared))
    assert rows_of(own) == rows_of(shared)


def test_a_node_trains_on_its_own_images_and_no_others(small: Config, shards: Path) -> None:
    config = resolve(small.changed({"rounds": 2}), "localsgd")
    one = with_folders(config.changed({"name": "one"}), shards)
    pixels = np.load(shards / "2" / "images.npy")
    np.save(shards / "2" / "images.npy", 255 - pixels)
    other = with_folders(config.changed({"name": "other"}), shards)
    assert any(not torch.equal(value, final_model(other)[name]) for name, value in final_model(one).items())


def test_a_node_keeps_its_images_for_the_whole_run(small: Config, shards: Path) -> None:
    config = resolve(small.changed({"rounds": 4, "name": "own"}), "localsgd")
    begun = with_folders(config.changed({"stop-after-rounds": 2}), shards)
    before = {path: path.read_bytes() for path in begun.folder.iterdir()}
    np.save(shards / "2" / "labels.npy", np.load(shards / "2" / "labels.npy")[::-1])
    with pytest.raises(UserError, match=r"^the labels.npy of the node with partition-id 2 have changed since the run"):
        with_folders(config, shards)
    assert {path: path.read_bytes() for path in begun.folder.iterdir()} == before
    np.save(shards / "2" / "labels.npy", np.load(shards / "2" / "labels.npy")[::-1])
    resumed = with_folders(config, shards)
    assert (read_summary(resumed.folder) or {})["own_data"].keys() == {"0", "1", "2", "3"}


def test_the_images_never_leave_a_node(small: Config, shards: Path) -> None:
    config = resolve(small.changed({"rounds": 2, "fraction": 0.5, "name": "own"}), "localsgd")
    replies: list[Message] = []
    with_folders(config, shards, replies)
    weights = {name: tuple(value.shape) for name, value in build_model("lenet5", 10, 0).state_dict().items()}
    momentum = {f"momentum/{name}/momentum_buffer": shape for name, shape in weights.items()}
    expected: dict[str, dict[str, Any]] = {
        "query.partition": {
            "partition": {"partition-id", "num-partitions"},
            "data": {"images.npy", "labels.npy"},  # a digest of each
            "code": set(),
        },
        "train": {"arrays": weights, "metrics": {"num-examples", "train-loss"}},
        "query.memory": {"memory": momentum},
    }
    expected["train, saved"] = expected["train"] | expected["query.memory"]
    seen = set()
    for reply in replies:
        sent: dict[str, Any] = {
            name: {key: tuple(array.shape) for key, array in record.items()}
            for name, record in reply.content.array_records.items()
        }
        sent |= {name: set(record) for name, record in reply.content.metric_records.items()}
        sent |= {name: set(record) for name, record in reply.content.config_records.items()}
        kind = reply.metadata.message_type + (", saved" if "metrics" in sent and "memory" in sent else "")
        if kind == "query.memory" and not sent["memory"]:
            continue  # of a client that was never sampled
        assert sent == expected[kind]
        seen.add(kind)
    assert seen == expected.keys()


GOOD, CLASSES = np.zeros((20, 32, 32, 3), np.uint8), np.zeros(20, np.int64)
BAD: list[tuple[str, Any, Any, str]] = [
    ("floats", GOOD / 1, CLASSES, "images.npy holds float64 [20, 32, 32, 3], not uint8 [N, 32, 32, 3]"),
    ("channels first", GOOD.transpose(0, 3, 1, 2), CLASSES, "images.npy holds uint8 [20, 3, 32, 32], not uint8"),
    ("one image", GOOD[0], CLASSES, "images.npy holds uint8 [32, 32, 3], not uint8"),
    ("float labels", GOOD, CLASSES / 1, "labels.npy holds float64 [20], not integers [N]"),
    ("one-hot", GOOD, np.eye(20, 10, dtype=int), "labels.npy holds int64 [20, 10], not integers [N]"),
    ("lengths", GOOD, CLASSES[1:], "images.npy holds 20 images and labels.npy 19 labels: make them equal"),
    ("class", GOOD, CLASSES + 10, "labels.npy runs from 10 to 10: the classes of synthetic:"),
    ("negative", GOOD, CLASSES - 1, "labels.npy runs from -1 to -1: the classes of synthetic:"),
    ("few", GOOD[:3], CLASSES[:3], "batch-size = 4 is more than its 3 images: give a smaller batch-size"),
    ("none", GOOD[:0], CLASSES[:0], "batch-size = 4 is more than its 0 images: give a smaller batch-size"),
    ("objects", np.array([None] * 20), CLASSES, "images.npy cannot be read as an array"),
]


@pytest.mark.parametrize(("pixels", "labels", "words"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_bad_images_of_a_nodes_own_are_told_in_a_line(
    small: Config, tmp_path: Path, pixels: np.ndarray, labels: np.ndarray, words: str
) -> None:
    folder = folder_of(pixels, labels, tmp_path / "own")
    with pytest.raises(UserError) as caught:
        own_images(small.changed({"data-dir": str(folder)}))
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"data-dir = {folder}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lacking", ["images.npy", "labels.npy"])
def test_a_folder_with_half_of_what_it_must_hold_is_refused(small: Config, shards: Path, lacking: str) -> None:
    (shards / "0" / lacking).unlink()
    with pytest.raises(UserError, match=rf"data-dir = .*: {lacking} cannot be read"):
        own_images(small.changed({"data-dir": str(shards / "0")}))


def test_a_folder_with_both_kinds_of_images_is_refused(small: Config, shards: Path) -> None:
    (shards / "0" / "cifar-100-python").mkdir()
    with pytest.raises(UserError, match="holds cifar-100-python/ too: keep one of the two"):
        own_images(small.changed({"data-dir": str(shards / "0")}))


def config_on_node(config: Config, **node_config: Any) -> Config:
    """The configuration of a run on a node with these keys in its node config."""
    keys = {name.replace("_", "-"): value for name, value in node_config.items()}
    context = Context(1, 2, {"partition-id": 0, "num-partitions": 4, **keys}, RecordDict(), dict(config.as_keys()))
    with InProcessGrid(client_app.app, config):  # within a run, where messages can be made
        message = Message(RecordDict({"config": ConfigRecord({**shared(config)})}), 2, "query.partition")
    return client_app._config(message, context)


@pytest.mark.parametrize(
    ("dataset", "wanted"),
    [("cifar100", "images.npy and labels.npy, or cifar-100-python/"), ("synthetic", "images.npy and labels.npy")],
)
def test_a_named_folder_without_images_fails_and_nothing_is_put_there(
    small: Config, tmp_path: Path, dataset: str, wanted: str
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        config_on_node(small.changed({"dataset": dataset}), data_dir=str(tmp_path / "empty"))
    folder = tmp_path / "empty"
    assert str(caught.value) == f"data-dir = {folder} of the node config holds no images: it must hold {wanted}"
    assert list(folder.iterdir()) == []


def test_a_run_whose_nodes_name_empty_folders_fails_and_says_why(small: Config, tmp_path: Path) -> None:
    for worker in range(4):
        (tmp_path / "empty" / str(worker)).mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"Left out: it cannot take part: .*data-dir = .* of the node config holds no images"
    ):
        with_folders(resolve(small.changed({"name": "run"}), "localsgd"), tmp_path / "empty")


def test_a_runs_own_folder_may_hold_no_images_of_a_node(small: Config, shards: Path) -> None:
    """In this process all clients would train on them; the nodes of a deployment may or may not have them."""
    config = resolve(small.changed({"name": "run", "data-dir": str(shards / "0")}), "localsgd")
    message = (
        rf"data-dir = {shards}/0 holds images.npy or labels.npy, the images of one node: name it in the node config"
    )
    with pytest.raises(UserError, match=message):
        execute(config, "localsgd")
    assert not (shards.parent / "run").exists()
    with pytest.raises(UserError, match=message):
        config_on_node(config)
    assert config_on_node(config, data_dir=str(shards / "1")).data_dir == str(shards / "1")


@pytest.mark.parametrize(
    ("data_dir", "words"), [("~nobody-of-this-name/x", "another user's home"), ("n" * 300, "more than 255 bytes")]
)
def test_a_folder_that_cannot_be_is_named(small: Config, data_dir: str, words: str) -> None:
    with pytest.raises(UserError, match=f"data-dir = .*{words}"):
        execute(small.changed({"name": "run", "dataset": "cifar100", "data-dir": data_dir}), "localsgd")


def test_what_is_cached_of_a_nodes_images_is_verified_when_it_joins_a_run(
    small: Config, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(shards.parent / "cache"))
    config = resolve(small.changed({"rounds": 2}), "localsgd")
    one = with_folders(config.changed({"name": "one"}), shards)
    for words in (shards.parent / "cache").rglob("words.npy"):
        content = bytearray(words.read_bytes())
        content[len(content) // 2 :] = content[: -len(content) // 2]
        words.write_bytes(content)
    other = with_folders(config.changed({"name": "other"}), shards)
    assert capsys.readouterr().err.count("are damaged: they are decoded again") == 4
    assert_same_bits(final_model(one), final_model(other))


def test_a_node_with_the_official_folder_takes_its_shard_of_it(small: Config, real_data: str) -> None:
    config = small.changed({"dataset": "cifar100", "data-dir": "/elsewhere"})
    assert config_on_node(config, data_dir=real_data).data_dir == real_data
    assert own_images(config_on_node(config, data_dir=real_data)) is None


def test_a_nodes_hardware_and_folder_stand_over_the_runs(small: Config, shards: Path) -> None:
    config = config_on_node(small.changed({"threads": 1}), threads=2, device="cpu", data_dir=str(shards / "0"))
    assert (config.threads, config.device, config.data_dir) == (2, "cpu", str(shards / "0"))
    assert config_on_node(small).threads == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lr", "lr cannot stand in the node config: a node may set data-dir, device, threads"),
        ("local_steps", "local_steps cannot stand in the node config: a node may set"),
        ("data_dir", "data_dir cannot stand in the node config: did you mean data-dir?"),
        ("datadir", "datadir cannot stand in the node config: did you mean data-dir?"),
        ("thread", "thread cannot stand in the node config: did you mean threads?"),
    ],
)
def test_other_keys_in_the_node_config_are_named(name: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        own_keys({"partition-id": 0, "num-partitions": 1, name: 1})
    assert str(caught.value).startswith(words)


def test_what_is_not_fedsims_in_the_node_config_is_left_alone() -> None:
    assert own_keys({"partition-id": 0, "num-partitions": 1, "rack": "b7", "threads": 2}) == {"threads": 2}


def test_shards_are_disjoint_whole_and_never_overwritten(small: Config, shards: Path) -> None:
    train = load_images(small).train
    parts = [np.load(shards / str(worker) / "images.npy") for worker in range(4)]
    labels = [np.load(shards / str(worker) / "labels.npy") for worker in range(4)]
    assert sorted(path.name for path in shards.iterdir()) == ["0", "1", "2", "3"]
    assert [len(part) for part in parts] == [len(part) for part in labels] == [32] * 4
    written = zip(np.concatenate(parts), np.concatenate(labels), strict=True)
    original = zip(train.pixels(), train.labels.numpy(), strict=True)
    assert sorted((image.tobytes(), int(label)) for image, label in written) == sorted(
        (image.tobytes(), int(label)) for image, label in original
    )
    before = {path: path.read_bytes() for path in shards.rglob("*.npy")}
    with pytest.raises(UserError, match=r"out = .*shards cannot be made \(Directory not empty\): give another folder"):
        write_shards(small.changed({"seed": 1}), shards)
    assert {path: path.read_bytes() for path in shards.rglob("*.npy")} == before
    assert [path.name for path in shards.parent.iterdir()] == ["shards"]
