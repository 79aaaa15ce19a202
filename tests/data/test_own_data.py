"""Data sets in official files that the tests write, in a file NAME.npz, and of a function; crops of any size."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import socket
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets
from torchvision.transforms.v2 import functional

from fedsim.config import Config
from fedsim.data import official
from fedsim.data.datasets import load_dataset, training_examples
from fedsim.data.image_sets import facts_of, image_shape, load_images, moments_of
from fedsim.data.images import Augmentation, Border, Images
from fedsim.data.local_folder import own_images, write_shards
from fedsim.errors import UserError
from fedsim.experiments.execute import execute
from tests.conftest import Execute, assert_same_bits, final_model
from tests.own_code import arrays

OWN = "tests.own_code"


def config_of(dataset: str, folder: Path, **keys: Any) -> Config:
    return Config().changed({"dataset": dataset, "data-dir": str(folder), "device": "cpu", **keys})


def shrink(monkeypatch: pytest.MonkeyPatch, name: str, images: int) -> None:
    """Let the training set of an official data set have so few images."""
    monkeypatch.setitem(official.OFFICIAL, name, dataclasses.replace(official.OFFICIAL[name], images=images))


def test_cifar10_is_read_from_its_official_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, 12)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name: str, part: slice) -> list[str]:
        entries = {"data": images[part].reshape(-1, 3072), "labels": labels[part].tolist()}
        (folder / name).write_bytes(pickle.dumps(entries))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    names = {"label_names": [f"class {number}" for number in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    meta = hashlib.md5((folder / "batches.meta").read_bytes()).hexdigest()
    train = [write(f"data_batch_{number + 1}", slice(2 * number, 2 * number + 2)) for number in range(5)]
    for name, value in {
        "train_list": train,
        "test_list": [write("test_batch", slice(10, 12))],
        "meta": {"filename": "batches.meta", "key": "label_names", "md5": meta},
    }.items():
        monkeypatch.setattr(datasets.CIFAR10, name, value)
    shrink(monkeypatch, "cifar10", 10)
    data = load_images(config_of("cifar10", tmp_path))
    assert np.array_equal(data.train.pixels(), images[:10].transpose(0, 2, 3, 1))
    assert np.array_equal(data.test.pixels(), images[10:].transpose(0, 2, 3, 1))
    assert data.train.labels.tolist() == labels[:10].tolist()
    assert data.classes == 10


def test_fashion_mnist_is_read_from_its_official_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    images = {"train": rng.integers(0, 256, (6, 28, 28), dtype=np.uint8), "t10k": np.zeros((2, 28, 28), np.uint8)}
    for split, pixels in images.items():
        sizes = b"".join(size.to_bytes(4, "big") for size in pixels.shape)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + pixels.tobytes())
        labels = np.arange(len(pixels), dtype=np.uint8)
        file = folder / f"{split}-labels-idx1-ubyte"
        file.write_bytes(b"\0\0\x08\x01" + len(labels).to_bytes(4, "big") + labels.tobytes())
    shrink(monkeypatch, "fashion-mnist", 6)
    config = config_of("fashion-mnist", tmp_path)
    data = load_images(config)
    assert np.array_equal(data.train.pixels(), images["train"][..., None])
    assert (data.train.labels.tolist(), len(data.test)) == (list(range(6)), 2)
    assert image_shape(config) == (1, 28, 28)
    plain = data.train.plain(0, 6)[0]
    torch.testing.assert_close(plain[:, 0], (torch.from_numpy(images["train"]) / 255 - 0.2860) / 0.3530)
    with pytest.raises(UserError, match="normalize = cifar10 has 3 channels, and the images of fashion-mnist 1"):
        moments_of(config.changed({"normalize": "cifar10"}))


def test_a_server_that_sends_nothing_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = socket.getdefaulttimeout()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/cifar-100-python.tar.gz"
        monkeypatch.setattr(datasets.CIFAR100, "url", address)
        monkeypatch.setattr(official, "SILENCE_SECONDS", 0.5)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with pytest.raises(UserError, match=r"has no CIFAR100 and it could not be downloaded or read \(.*timed out"):
            load_dataset(config_of("cifar100", tmp_path))
    assert socket.getdefaulttimeout() == before


@pytest.mark.parametrize(
    ("dataset", "remedy"),
    [
        ("cifar10", "no CIFAR10 that can be read (there is no cifar-10-batches-py): unpack cifar-10-python.tar.gz th"),
        ("fashion-mnist", "put its four unpacked files there, as FashionMNIST/raw/train-images-idx3-ubyte and so on"),
    ],
)
def test_files_that_are_not_there_are_not_downloaded(tmp_path: Path, dataset: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        load_dataset(config_of(dataset, tmp_path))
    assert remedy in str(caught.value)
    assert str(caught.value).startswith(f"data-dir = {tmp_path} has no ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dataset", "folder"), [(name, of.folder) for name, of in official.OFFICIAL.items()])
def test_damaged_files_are_named(tmp_path: Path, dataset: str, folder: str) -> None:
    (tmp_path / folder).mkdir(parents=True)
    for name in official.OFFICIAL[dataset].files:
        (tmp_path / folder / name).write_bytes(b"cut short")
    with pytest.raises(UserError, match=f"data-dir = .* holds a damaged {folder}"):
        load_dataset(config_of(dataset, tmp_path))


def test_the_superclasses_of_the_real_cifar100(real_data: str) -> None:
    coarse = official.coarse_labels(Path(real_data))
    assert np.bincount(coarse).tolist() == [5] * 20
    assert len({coarse[4], coarse[30], coarse[55], coarse[72], coarse[95]}) == 1  # beaver, dolphin, otter, seal, whale


def test_a_file_and_a_function_give_the_same_run(run: Execute, tmp_path: Path) -> None:
    """Grey images of 12 x 10 pixels."""
    np.savez(tmp_path / "mine.npz", **arrays())  # type: ignore[arg-type]
    keys = {"model": f"{OWN}:mlp", "clients": 2, "batch_size": 8}
    of_function = run(**keys, dataset=f"{OWN}:load", name="function")
    of_file = run(**keys, dataset="mine.npz", data_dir=str(tmp_path), name="file")
    again = run(**keys, dataset=str(tmp_path / "mine.npz"), name="path")  # from the cache
    assert_same_bits(final_model(of_function), final_model(of_file))
    assert_same_bits(final_model(of_function), final_model(again))
    assert final_model(of_function)["2.weight"].shape == (16, 120)


def test_facts_and_moments_of_ones_own_images(tmp_path: Path) -> None:
    held = arrays(shape=(9, 7, 5))
    np.savez_compressed(tmp_path / "mine.npz", **held)  # type: ignore[arg-type]
    config = config_of("mine.npz", tmp_path, **{"augment.padding": 0, "validation": 16})
    facts = facts_of(config)
    assert (facts.classes, facts.images, facts.shape) == (3, 96, (9, 7, 5))
    assert training_examples(config) == 80
    mean, deviation = moments_of(config)
    pixels = held["train_images"].reshape(-1, 5) / 255
    assert mean == pytest.approx(pixels.mean(0))
    assert deviation == pytest.approx(pixels.std(0))
    test = load_images(config.changed({"validation": 0})).test
    assert np.array_equal(test.pixels(), held["test_images"])


@pytest.mark.parametrize(
    ("dataset", "data_dir", "environment", "passed"),
    [
        ("here.npz", "", "", "{here}"),
        ("here.npz", "mydata", "", "{here}"),
        ("there.npz", "mydata", "", "{here}/mydata"),
        ("there.npz", "", "mydata", "{here}/mydata"),
        ("there.npz", "", "{here}/mydata", ""),
        ("synthetic", "mydata", "", "{here}/mydata"),
        ("synthetic", "", "", ""),
    ],
)
def test_flower_finds_the_data_of_a_relative_path(
    small: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dataset: str,
    data_dir: str,
    environment: str,
    passed: str,
) -> None:
    """Its processes work in another folder, and the run is the same one."""
    (tmp_path / "mydata").mkdir()
    for file in ("here.npz", "mydata/there.npz"):
        np.savez(tmp_path / file, **arrays())  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSIM_DATA", environment.format(here=tmp_path))
    given: list[Config] = []
    monkeypatch.setattr("fedsim.experiments.execute.run_with_flwr", given.append)
    config = small.changed({"dataset": dataset, "data-dir": data_dir, "name": "run", "model": f"{OWN}:mlp"})
    execute(config, "localsgd", "flower")
    assert given[0].data_dir == passed.format(here=tmp_path)
    assert given[0].identity("localsgd") == config.identity("localsgd")
    if dataset.endswith(".npz"):
        monkeypatch.chdir("/")
        assert len(load_dataset(given[0]).train) == 96


GOOD = arrays(24)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"test_labels": None}, "has no test_labels: it must have train_images, train_labels, test_images, test_labels"),
    ({"train_images": GOOD["train_images"] / 255}, "train_images holds float64 [24, 12, 10, 1], not uint8 [N, 12, 10"),
    ({"train_images": GOOD["train_images"][..., 0]}, "train_images holds uint8 [24, 12, 10], not uint8 [N, H, W, C]"),
    ({"test_images": GOOD["test_images"][:, :9]}, "test_images holds uint8 [6, 9, 10, 1], not uint8 [N, 12, 10, 1]"),
    ({"train_labels": GOOD["train_labels"][1:]}, "train_images holds 24 images and train_labels 23 labels"),
    ({"train_labels": GOOD["train_labels"] - 1}, "train_labels runs from -1 to 1: classes are 0 to 99999 at most"),
    ({"test_labels": GOOD["test_labels"] + 10**6}, "test_labels runs from 1000000 to"),
    (
        {"train_images": GOOD["train_images"].transpose(0, 3, 2, 1).repeat(2, 3)},
        "train_images holds [24, 1, 10, 24]: images must be (N, H, W, C), channels last",
    ),
    ({"train_labels": GOOD["train_labels"] / 1}, "train_labels holds float64 [24], not integers [N]"),
    ({"train_images": GOOD["train_images"][:0], "train_labels": GOOD["train_labels"][:0]}, "holds no pixels: [0, 12"),
    ({"train_labels": np.array([None] * 24)}, "cannot be read (ValueError: Object arrays cannot be loaded"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_file_that_holds_something_else_is_told_in_a_line(
    small: Config, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "bad.npz", **{name: value for name, value in (GOOD | changes).items() if value is not None})
    config = small.changed({"dataset": str(tmp_path / "bad.npz"), "name": "run"})
    with pytest.raises(UserError) as caught:
        execute(config, "localsgd")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"dataset = {tmp_path / 'bad.npz'}")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.npz"]


def test_a_file_that_is_not_npz_is_told_in_a_line(small: Config, tmp_path: Path) -> None:
    np.save(tmp_path / "bad.npy", GOOD["train_images"])
    file = (tmp_path / "bad.npy").rename(tmp_path / "bad.npz")
    with pytest.raises(UserError, match=rf"^dataset = {file} is not a file of numpy\.savez \(BadZipFile: .*: write it"):
        execute(small.changed({"dataset": str(file)}), "localsgd")


def test_a_file_that_expands_to_more_than_memory_is_not_read(small: Config, tmp_path: Path) -> None:
    """Known by the headers of its arrays alone; this one has no more."""
    file = tmp_path / "bomb.npz"
    np.savez(file, **{name: array for name, array in GOOD.items() if name != "train_images"})  # type: ignore[arg-type]
    with zipfile.ZipFile(file, "a") as archive, archive.open("train_images.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 32, 32, 3)}
        np.lib.format.write_array_header_1_0(member, header)
    # 3,072 bytes of an image, and 4 of each of 40 x 40 pixels with the border
    with pytest.raises(UserError, match=rf"^dataset = {file} needs 9,472.0 GB of memory, and .* GB are free: give few"):
        execute(small.changed({"dataset": str(file)}), "localsgd")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("absent.npz", "dataset = absent.npz: there is no such file in "),
        (f"{OWN}:no_dict", "returns list: it must return a dict of train_images, train_labels, test_images, test_labe"),
        (f"{OWN}:ragged", f"dataset = {OWN}:ragged: train_images is not an array (ValueError: setting an array"),
        (
            "tests.exits:load",
            "dataset = tests.exits:load: tests.exits exits where it is imported: let only a script do",
        ),
        (
            f"{OWN}:unseeded",
            f"dataset = {OWN}:unseeded gives other train_images, train_labels when it is called again: draw with a",
        ),
        (f"{OWN}:load_fails", f"dataset = {OWN}:load_fails fails with FileNotFoundError"),
        ("no.such:load", "dataset = no.such:load: no module no on this machine: install it, or put its folder on PY"),
    ],
)
def test_a_data_set_that_cannot_be_loaded_is_told_in_a_line(small: Config, dataset: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        execute(small.changed({"dataset": dataset}), "localsgd")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("channels", "crop", "padding"), [(1, 24, 0), (3, 24, 4), (4, 0, 2), (6, 30, 3)])
def test_crops_of_any_size_are_those_of_torchvision(channels: int, crop: int, padding: int) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 26, 28, channels), dtype=np.uint8)
    how = Augmentation(crop_size=crop, border=Border(padding))
    images = Images(pixels, np.arange(8), ((0.0,) * channels, (1.0,) * channels), "cpu", how)
    height, width = crop or 26, crop or 28
    assert images.shape == (channels, height, width)
    assert np.array_equal(images.pixels(), pixels)
    tops, lefts = images.corners
    assert (tops, lefts) == (26 + 2 * padding - height + 1, 28 + 2 * padding - width + 1)
    index, top, left, flip = (torch.from_numpy(rng.integers(0, n, 30)) for n in (8, tops, lefts, 2))
    crops = images.crop(index, top, left, flip)
    for one, i, y, x, mirrored in zip(crops, index, top, left, flip, strict=True):
        bordered = functional.pad(torch.from_numpy(pixels[i]).permute(2, 0, 1), [padding])
        expected = bordered[:, y : y + height, x : x + width] / 255
        torch.testing.assert_close(one, expected.flip(2) if mirrored else expected, rtol=0, atol=2e-6)
    middle = functional.center_crop(torch.from_numpy(pixels).permute(0, 3, 1, 2), [height, width]) / 255
    torch.testing.assert_close(images.plain(0, 8)[0], middle, rtol=0, atol=2e-6)
    half = images.subset(np.array([5, 2]))
    assert np.array_equal(half.pixels(), pixels[[5, 2]])


def test_a_crop_larger_than_the_image_and_its_border_is_refused(small: Config) -> None:
    with pytest.raises(UserError, match=r"size = 37 is more than the 36 pixels of an image .* a larger padding"):
        execute(small.changed({"augment.size": 37, "augment.padding": 2}), "localsgd")


def test_a_nodes_own_images_have_the_shape_and_the_crops_of_the_run(small: Config, tmp_path: Path) -> None:
    keys = {"dataset": f"{OWN}:load", "clients": 2, "batch-size": 8, "augment.size": 8, "augment.padding": 1}
    config = small.changed(keys)
    write_shards(config, tmp_path / "shards")
    own = own_images(config.changed({"data-dir": str(tmp_path / "shards" / "1")}))
    assert own is not None
    assert (own.shape, own.corners, len(own)) == ((1, 8, 8), (7, 5), 48)
    with pytest.raises(UserError, match=r"images.npy holds uint8 \[48, 12, 10, 1\], not uint8 \[N, 32, 32, 3\]"):
        own_images(small.changed({"data-dir": str(tmp_path / "shards" / "1")}))
