from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fedsim.config import Config
from fedsim.data import cache as image_cache
from fedsim.data.cache import Arrays, cached, discard_damaged, user_cache
from fedsim.data.folder import data_folder
from fedsim.data.image_sets import load_images
from fedsim.errors import UserError


class Made:
    """A maker of arrays of a file's bytes that counts how often it is asked."""

    def __init__(self, source: Path) -> None:
        self.source, self.times = source, 0

    def __call__(self) -> Arrays:
        self.times += 1
        content = np.frombuffer(self.source.read_bytes(), np.uint8)
        return {"words": content.astype(np.int32), "labels": content.astype(np.int64)}

    def kept(self) -> Arrays:
        return cached([self.source], ["words", "labels"], self)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "source").write_bytes(b"abc")
    return Made(tmp_path / "source")


def folders(tmp_path: Path) -> list[Path]:
    """What the cache holds: a folder for each source and key."""
    return list((tmp_path / "cache" / "fedsim" / "arrays").glob("*/*"))


def test_what_is_made_once_is_mapped_afterwards(made: Made) -> None:
    first, again = made.kept(), made.kept()
    assert made.times == 1
    for name, array in made().items():
        assert isinstance(again[name], np.memmap)
        assert again[name].dtype == array.dtype
        assert np.array_equal(first[name], array)
        assert np.array_equal(again[name], array)


def test_what_is_written_to_mapped_arrays_stays_in_the_process(made: Made) -> None:
    made.kept()["words"][0] = 7
    assert made.kept()["words"][0] == ord("a")


@pytest.mark.parametrize("change", ["content", "time", "format"])
def test_another_source_is_made_anew_in_place_of_the_old(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    made.kept()
    if change == "content":
        made.source.write_bytes(b"abcd")
    elif change == "time":
        os.utime(made.source, ns=(0, 1))
    else:
        monkeypatch.setattr(image_cache, "FORMAT", image_cache.FORMAT + 1)
    assert made.kept()["words"].tolist() == list(made.source.read_bytes())
    assert made.times == 2
    assert len(folders(tmp_path)) == 1


def test_a_source_elsewhere_has_a_place_of_its_own(made: Made, tmp_path: Path) -> None:
    shutil.copy2(made.source, tmp_path / "copy")
    made.kept()
    Made(tmp_path / "copy").kept()
    assert len(folders(tmp_path)) == 2
    made.kept()
    assert made.times == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "missing"])
def test_damaged_arrays_are_made_anew(made: Made, tmp_path: Path, damage: str) -> None:
    made.kept()
    path = folders(tmp_path)[0] / "labels.npy"
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1 if damage == "cut" else 0)
    assert made.kept()["labels"].tolist() == list(b"abc")
    assert made.times == 2
    made.kept()
    assert made.times == 2


def test_a_changed_bit_is_noticed_wherever_it_is(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made.kept()
    assert not discard_damaged([made.source])
    moments = random.Random(2026)
    for flips in range(1, 21):
        folder = folders(tmp_path)[0]
        path = moments.choice(sorted(folder.iterdir()))
        flip_a_bit(path, moments)
        assert discard_damaged([made.source])
        assert capsys.readouterr().err == f"the cached images in {folder} are damaged: they are decoded again\n"
        assert made.kept()["words"].tolist() == made.kept()["labels"].tolist() == list(b"abc")
        assert made.times == flips + 1
        assert len(folders(tmp_path)) == 1


def flip_a_bit(path: Path, moments: random.Random) -> None:
    """One bit of the file becomes another, in place, as on a failing disk."""
    content = bytearray(path.read_bytes())
    content[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
    path.write_bytes(content)


def test_what_an_interrupted_process_left_is_removed(made: Made, tmp_path: Path) -> None:
    made.kept()
    left = folders(tmp_path)[0].parent / ".part-left"
    left.mkdir()
    (left / "words.npy").write_bytes(b"half")
    made.source.write_bytes(b"xyz")
    made.kept()
    assert [path.name for path in folders(tmp_path)[0].parent.iterdir()] == [folders(tmp_path)[0].name]


def test_makers_at_once_all_have_the_arrays_and_one_of_them_stays(made: Made, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        every = list(pool.map(lambda _: made.kept(), range(8)))
    assert all(arrays["words"].tolist() == list(b"abc") for arrays in every)
    times = made.times
    made.kept()
    assert made.times == times
    assert len(folders(tmp_path)) == 1


def test_a_cache_that_cannot_be_written_is_said_once_and_done_without(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("no folder")
    for _ in range(2):
        assert made.kept()["words"].tolist() == list(b"abc")
    assert made.times == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"cannot cache images in {tmp_path}/cache/fedsim (Not a directory)" in said


def test_a_missing_source_is_for_its_maker_to_tell(made: Made) -> None:
    made.kept()
    made.source.unlink()
    with pytest.raises(FileNotFoundError):
        made.kept()


def test_a_cache_in_the_home_of_nobody_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name/cache")
    with pytest.raises(UserError, match="the cache folder ~nobody-of-this-name/cache is in no user's home"):
        user_cache()


READ = """
import sys
from fedsim.config import Config
from fedsim.data.datasets import load_dataset
data = load_dataset(Config(data_dir=sys.argv[1], device="cpu"))
print("torchvision" in sys.modules, data.train.labels.sum().item(), data.test.plain(0, 250)[0].double().sum().item())
"""


def test_a_new_process_maps_the_real_images_and_notices_a_changed_bit(real_data: str, tmp_path: Path) -> None:
    def read(cache: Path) -> tuple[str, ...]:
        done = subprocess.run(
            [sys.executable, "-c", READ, real_data],
            env={**os.environ, "XDG_CACHE_HOME": str(cache)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0
        return (*done.stdout.split(), done.stderr)

    first, again = read(tmp_path), read(tmp_path)
    assert (first[0], again[0]) == ("True", "False")
    assert first[1:] == again[1:]
    assert again[-1] == ""
    (words,) = tmp_path.rglob("train-words.npy")
    with words.open("r+b") as file:
        file.seek(200_000_000)
        changed = bytes([file.read(1)[0] ^ 1])
        file.seek(200_000_000)
        file.write(changed)
    restored = read(tmp_path)
    assert restored[:-1] == first[:-1]
    assert restored[-1] == f"the cached images in {words.parent} are damaged: they are decoded again\n"
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.npy")) > 60_000 * 6400


def test_the_real_images_are_the_same_bits_from_the_cache(real_data: str) -> None:
    from torchvision.datasets import CIFAR100

    assert str(data_folder(Config())) == real_data
    data = load_images(Config(device="cpu"))
    for images, train in ((data.train, True), (data.test, False)):
        official = CIFAR100(real_data, train=train)
        assert np.array_equal(images.pixels(), official.data)
        assert images.labels.tolist() == official.targets
