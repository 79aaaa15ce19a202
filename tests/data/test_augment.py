"""What is done to images in training: the values of augment, crop-padding-mode and normalize, and code of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedsim.config import Config
from fedsim.data.image_sets import augmentation_of, load_images
from fedsim.data.images import Augmentation, Border, Images, sample_crops
from fedsim.device import resolve
from fedsim.errors import UserError
from fedsim.experiments.execute import execute
from fedsim.rng import random_words, step_keys
from fedsim.training.local_round import RoundStart, check_machine, round_inputs
from tests.conftest import Execute, assert_same_bits, final_model, rows_of
from tests.federation.equal_runs import stopped_and_resumed

OWN = "tests.own_code"
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 10, 12, 3), dtype=np.uint8)


def images_of(how: Augmentation) -> Images:
    return Images(PIXELS, np.arange(20), ((0.0,) * 3, (1.0,) * 3), "cpu", how)


def test_what_each_value_draws() -> None:
    index, words = np.arange(20), random_words(step_keys(1, 0, 0, 1, "augment"), 20)[0]
    usual, crop, none, own = (
        images_of(augmentation_of(Config(augment=augment)))
        for augment in ("crop+mirror", "crop", "none", f"{OWN}:erase")
    )
    both = sample_crops(index, words, usual.corners)
    assert torch.equal(usual.sample(index, words), both)
    assert both[3].any()
    assert torch.equal(crop.sample(index, words), torch.cat([both[:3], torch.zeros(1, 20, dtype=torch.int64)]))
    plain = none.plain(0, 20)[0]
    for images in (none, own):
        assert torch.equal(images.crop(*images.sample(index, words)), plain)
    cut = images_of(augmentation_of(Config(augment="center:size=8")))
    assert torch.equal(cut.crop(*cut.sample(index, words)), plain[:, :, 1:9, 2:10])


def test_the_border_is_black_or_the_image_reflected() -> None:
    whole = torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255
    zeros, index = torch.zeros(20, dtype=torch.int64), torch.arange(20)
    for mode in ("constant", "reflect"):
        images = images_of(Augmentation(border=Border(3, mode)))
        expected = F.pad(whole, (3, 3, 3, 3), mode)
        torch.testing.assert_close(images.crop(index, zeros, zeros, zeros), expected[:, :, :10, :12], rtol=0, atol=1e-6)
        assert np.array_equal(images.pixels(), PIXELS)


def test_without_normalization_pixels_are_from_0_to_1(small: Config) -> None:
    images = load_images(small.changed({"dataset": f"{OWN}:load", "normalize": "none"})).train
    expected = torch.from_numpy(images.pixels()).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(images.plain(0, len(images))[0], expected, rtol=0, atol=1e-6)


def test_the_order_of_tokens_is_learned_only_without_mirroring(run: Execute) -> None:
    keys = {"dataset": f"{OWN}:order", "model": f"{OWN}:mlp", "batch_size": 16, "epochs": 4.0, "lr": 0.05}
    mirrored, not_mirrored = (
        rows_of(run(name=augment, augment=augment, evaluate_every=100, **keys))[-1]["test_accuracy"]
        for augment in ("crop+mirror", "none")
    )
    assert mirrored < 0.75
    assert not_mirrored > 0.95


def test_an_own_augmentation_belongs_to_seed_worker_and_local_step(small: Config, run: Execute) -> None:
    keys = {"dataset": f"{OWN}:larger", "model": f"{OWN}:mlp", "augment": f"{OWN}:erase", "batch-size": 16}
    central = run("centralized", name="central", **keys)
    alone = run(name="alone", clients=1, local_steps=8, **keys)
    assert_same_bits(final_model(alone), final_model(central))
    plain = run(name="plain", clients=1, local_steps=8, **{**keys, "augment": "none"})
    assert not torch.equal(final_model(plain)["2.weight"], final_model(alone)["2.weight"])
    stopped_and_resumed(run, keys)
    config = resolve(small.changed(keys), "localsgd")
    drawn = [
        round_inputs(config, RoundStart(worker, round_, {}, {})).augment_keys for worker, round_ in ((0, 1), (1, 1))
    ]
    assert len({key for keys in drawn for key in keys}) == 4


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"augment": "flip"},
            "augment = flip is unknown: it must be one of none, crop, center, mirror",
        ),
        ({"augment": f"{OWN}:gone"}, "augment = tests.own_code:gone: tests.own_code has no function or class gone"),
        (
            {"augment": f"{OWN}:coin"},
            "coin gives other images on another call: let it draw from the generator it is giv",
        ),
        (
            {"augment": f"{OWN}:cut"},
            "cut returns torch.float32 [8, 3, 31, 32] for torch.float32 [8, 3, 32, 32]: it must",
        ),
        (
            {"augment": f"{OWN}:doubled"},
            "doubled returns torch.float64 [8, 3, 32, 32] for torch.float32 [8, 3, 32, 32]",
        ),
        (
            {"augment": f"{OWN}:listed"},
            "augment = tests.own_code:listed returns list: it must return a tensor like the",
        ),
        ({"augment": f"{OWN}:of_images_alone"}, "augment = tests.own_code:of_images_alone fails with TypeError: "),
        ({"augment": "center:size=24,padding=2"}, "a crop in the middle does not reach into the border: leave out"),
        ({"augment": f"{OWN}:erase:mode=reflect"}, "tests.own_code:erase has no argument mode: it takes none"),
        ({"augment": "mirror+crop"}, "augment = mirror+crop: give crop or center, then mirror, then functions of your"),
        (
            {"augment": "crop:padding=0"},
            "augment = crop:padding=0: a crop without a border is the whole image: give",
        ),
        (
            {"augment.padding": 32, "augment.mode": "reflect"},
            "needs a border narrower than the 32 pixels of an image",
        ),
        ({"augment.padding": 0, "augment.mode": "reflect"}, "and not padding = 0: give 1 to 31"),
    ],
)
def test_what_has_no_effect_or_does_not_fit_is_refused_in_a_line(
    small: Config, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        execute(small.changed(keys), "localsgd")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_node_tries_the_augmentation_of_the_run(small: Config) -> None:
    with pytest.raises(UserError, match="coin gives other images on another call"):
        check_machine(small.changed({"augment": f"{OWN}:coin"}))
