from __future__ import annotations

import shutil
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from fedsim.config import Config
from fedsim.data.datasets import load_dataset, training_examples
from fedsim.data.folder import data_folder
from fedsim.data.image_sets import load_images
from fedsim.data.images import Images, sample_crops
from fedsim.data.official import CIFAR100
from fedsim.data.partition import check_shards, sample_order, shard
from fedsim.data.task import Dataset
from fedsim.errors import UserError
from fedsim.rng import random_words, step_keys


def images_of(count: int = 20) -> tuple[Images, np.ndarray]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return Images(pixels, np.arange(count), CIFAR100, "cpu"), pixels


def drawn(order: np.ndarray, step: int = 0) -> torch.Tensor:
    """Crops of the images in `order`, all of one step."""
    return sample_crops(order, random_words(step_keys(1, 0, step, 1, "augment"), len(order))[0], (9, 9))


def batches(images: Images, sample: torch.Tensor, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [images.batch(part, [0]) for part in torch.split(sample, size, dim=1)]


def test_crops_are_those_of_torchvision() -> None:
    images, pixels = images_of()
    rng = np.random.default_rng(1)
    index, top, left, flip = (rng.integers(0, n, 50) for n in (20, 9, 9, 2))
    at, y0, x0, mirror = (torch.from_numpy(x) for x in (index, top, left, flip))
    crops = images.crop(at, y0, x0, mirror)
    normalise = v2.Normalize(*CIFAR100)
    for crop, i, y, x, mirrored in zip(crops, index, top, left, flip, strict=True):
        one = functional.pad(torch.from_numpy(pixels[i]).permute(2, 0, 1), [4])[:, y : y + 32, x : x + 32]
        expected = normalise((one.flip(2) if mirrored else one).float() / 255)
        torch.testing.assert_close(crop, expected, rtol=0, atol=2e-6)


def test_crops_of_replicas_stand_side_by_side_as_channels() -> None:
    images, _ = images_of(24)
    index, top, left, flip = drawn(np.arange(24))
    alone, together = images.crop(index, top, left, flip), images.crop(index, top, left, flip, replicas=3)
    assert together.shape == (8, 9, 32, 32)
    assert together.is_contiguous(memory_format=torch.channels_last)
    for replica in range(3):
        assert torch.equal(together[:, 3 * replica : 3 * replica + 3], alone[8 * replica : 8 * replica + 8])


def test_crops_are_channels_last_and_plain_images_are_whole() -> None:
    images, pixels = images_of()
    plain, labels = images.plain(5, 100)
    assert plain.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == list(range(5, 20))
    expected = v2.Normalize(*CIFAR100)(torch.from_numpy(pixels[5:]).permute(0, 3, 1, 2).float() / 255)
    torch.testing.assert_close(plain, expected, rtol=0, atol=2e-6)


def test_batches_crop_everywhere_and_mirror_half() -> None:
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    pixels[0, 16, 10] = 255  # one white pixel tells where a crop was cut, and whether it was mirrored
    images = Images(pixels, np.zeros(1, np.int64), ((0.0,) * 3, (1.0,) * 3), "cpu")
    order = np.zeros(4000, np.int64)
    found: dict[tuple[int, int], int] = {}
    for inputs, _ in batches(images, drawn(order), 500):
        for row, column in (inputs[:, 0] > 0.5).nonzero()[:, 1:].tolist():
            found[row, column] = found.get((row, column), 0) + 1
    unmirrored = {(20 - y, 14 - x) for y in range(9) for x in range(9)}
    mirrored = {(row, 31 - column) for row, column in unmirrored}
    assert found.keys() == unmirrored | mirrored
    assert abs(sum(found[place] for place in mirrored - unmirrored) / 4000 - 0.5) < 0.05


def test_batches_end_with_the_ragged_one_and_follow_their_step() -> None:
    images, _ = images_of()
    order = np.arange(20)[::-1].copy()
    first = list(batches(images, drawn(order, 3), 8))
    again = list(batches(images, drawn(order, 3), 8))
    other = list(batches(images, drawn(order, 4), 8))
    assert [len(labels) for _, labels in first] == [8, 8, 4]
    assert torch.cat([labels for _, labels in first]).tolist() == order.tolist()
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])


@pytest.mark.parametrize(("size", "workers"), [(50_000, 12), (50_000, 1), (7, 7), (103, 4)])
def test_shards_are_disjoint_covering_even_and_seeded(size: int, workers: int) -> None:
    shards = [shard(size, workers, worker, seed=1) for worker in range(workers)]
    assert sorted(np.concatenate(shards).tolist()) == list(range(size))
    assert {len(part) for part in shards} <= {size // workers, size // workers + 1}
    assert all(np.array_equal(part, shard(size, workers, worker, seed=1)) for worker, part in enumerate(shards))
    others = [shard(size, workers, worker, seed=2) for worker in range(workers)]
    assert not all(map(np.array_equal, shards, others))


def test_reshuffle_epoch_passes_over_the_shard_once_before_any_image_comes_again() -> None:
    taken = [sample_order(10, first, 4, 1, 2, "epoch") for first in range(0, 40, 4)]
    passes = np.concatenate(taken).reshape(4, 10)
    assert all(sorted(row) == list(range(10)) for row in passes.tolist())
    assert not np.array_equal(passes[0], passes[1])
    assert np.array_equal(np.concatenate(taken[:5]), sample_order(10, 0, 20, 1, 2, "epoch"))  # whatever the rounds


def test_reshuffle_round_begins_a_pass_at_every_round() -> None:
    one, two = (sample_order(10, first, 25, 1, 2, "round") for first in (0, 25))
    assert sorted(one[:10]) == sorted(one[10:20]) == sorted(two[:10]) == list(range(10))
    assert not np.array_equal(one, two)


def test_workers_draw_apart() -> None:
    one, other = (sample_order(100, 0, 100, 1, worker, "epoch") for worker in (0, 1))
    assert not np.array_equal(one, other)


def test_synthetic_images_are_the_same_every_time_and_balanced() -> None:
    config = Config(dataset="synthetic:classes=7,images=70", device="cpu")
    first = load_images(config)
    load_images.__globals__["_whole"].cache_clear()
    again = load_images(config)
    assert torch.equal(first.train.plain(0, 70)[0], again.train.plain(0, 70)[0])
    assert first.train.labels.bincount().tolist() == [10] * 7
    assert (len(first.train), len(first.test), first.classes) == (70, 17, 7)
    assert first.train.plain(0, 1)[0].shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("workers", "batch", "message"), [(101, 1, "clients = 101 is more than the 100"), (4, 26, "batch-size = 26")]
)
def test_shards_that_cannot_be_filled_are_refused(workers: int, batch: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_shards(Config(batch_size=batch), 100, workers)


def test_data_folder_is_the_key_or_the_environments_or_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    assert data_folder(Config()) == Path("/cache/fedsim")
    monkeypatch.setenv("FEDSIM_DATA", "/data")
    assert data_folder(Config()) == Path("/data")
    assert data_folder(Config(data_dir="/own")) == Path("/own")


def test_absent_data_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there: as good as no network
    with pytest.raises(UserError, match=r"put cifar-100-python.tar.gz there, or give --dataset synthetic"):
        load_dataset(Config(data_dir=str(tmp_path), device="cpu"))


def test_damaged_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"cut short")
    with pytest.raises(UserError, match="holds a damaged cifar-100-python"):
        load_dataset(Config(data_dir=str(tmp_path), device="cpu"))


def test_an_unreadable_data_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data-dir = .*file"):
        load_dataset(Config(data_dir=str(tmp_path / "file"), device="cpu"))


def test_the_real_data_is_the_official_one(real_data: str) -> None:
    data = load_images(Config(data_dir=real_data, device="cpu"))
    assert (len(data.train), len(data.test), data.classes) == (50_000, 10_000, 100)
    assert data.train.labels.bincount().tolist() == [500] * 100
    assert data.test.labels.bincount().tolist() == [100] * 100
    inputs = torch.cat([data.train.plain(i, i + 5000)[0] for i in range(0, 50_000, 5000)])
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=2e-3, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3)), torch.ones(3), atol=2e-3, rtol=0)


def test_a_damaged_copy_of_the_real_data_is_found_out(real_data: str, tmp_path: Path) -> None:
    shutil.copytree(Path(real_data) / "cifar-100-python", tmp_path / "cifar-100-python")
    with (tmp_path / "cifar-100-python" / "test").open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"\0\1\2\3")
    with pytest.raises(UserError, match="holds a damaged cifar-100-python"):
        load_dataset(Config(data_dir=str(tmp_path), device="cpu"))


def test_a_validation_split_is_seeded_disjoint_covering_and_out_of_training() -> None:
    config = Config(dataset="synthetic:images=60", device="cpu")
    whole = load_images(config).train.plain(0, 60)[0]
    split, again, other = (
        cast("Dataset[Images]", load_dataset(config.changed(keys)))
        for keys in ({"validation": 20}, {"validation": 20}, {"validation": 20, "seed": 1})
    )
    assert (len(split.train), len(split.test), training_examples(config.changed({"validation": 20}))) == (40, 20, 40)
    parts = torch.cat([split.train.plain(0, 40)[0], split.test.plain(0, 20)[0]])
    places = [int((whole == image).flatten(1).all(1).nonzero()) for image in parts]
    assert sorted(places) == list(range(60))
    assert torch.equal(split.test.labels, load_images(config).train.labels[places[40:]])
    assert torch.equal(split.test.plain(0, 20)[0], again.test.plain(0, 20)[0])
    assert not torch.equal(split.test.plain(0, 20)[0], other.test.plain(0, 20)[0])


def test_a_validation_split_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="validation = 60 leaves none of the 60 training images"):
        load_dataset(Config(dataset="synthetic:images=60", validation=60, device="cpu"))
