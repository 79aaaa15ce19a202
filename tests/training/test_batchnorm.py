"""Re-estimated statistics: those of PyTorch's update_bn, and a function of weights, seed and images alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from fedsim import device
from fedsim.config import Config
from fedsim.data.image_sets import load_images
from fedsim.tasks.classification import Classification
from fedsim.training.batchnorm import BATCH, calibration_sample, reestimate
from tests.conftest import assert_same_bits


@pytest.fixture
def small(small: Config) -> Config:
    """With enough images for four batches."""
    return small.changed({"dataset.images": 4 * BATCH})


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 5, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(196, 5), nn.BatchNorm1d(5), nn.Linear(5, 10)).double()


def test_it_is_update_bn_of_the_same_batches(small: Config) -> None:
    images, model, expected = load_images(small).train, network(), network()
    crops = calibration_sample(small, images, 3 * BATCH + 5)
    batches = [images.crop(*part).double() for part in torch.split(crops, BATCH, dim=1)]
    assert [len(batch) for batch in batches] == [BATCH] * 3
    reestimate(Classification(), model, images, crops, "fp64")
    update_bn(batches, expected)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    assert float((model[1].running_mean - network()[1].running_mean).abs().min()) > 1e-4  # type: ignore[operator]


def test_dropout_and_cores_change_nothing(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    images = load_images(small).train
    states = []
    for cores, dropout in ((1, 0.0), (4, 0.0), (4, 0.5)):
        monkeypatch.setattr(device, "cpu_count", lambda cores=cores: cores)
        model = network(dropout).float().train()
        reestimate(Classification(), model, images, calibration_sample(small, images, 12_800))
        states.append(model.state_dict())
    assert_same_bits(states[0], states[1])
    assert_same_bits(states[0], states[2])


def test_the_images_are_a_function_of_the_seed_and_not_of_the_workers(small: Config) -> None:
    images = load_images(small).train
    crops = calibration_sample(small, images, 12_800)
    for other in ({"clients": 2}, {"local-steps": 1}, {"batch-size": 8}, {"threads": 2}):
        assert torch.equal(calibration_sample(small.changed(other), images, 12_800), crops)
    assert not torch.equal(calibration_sample(small.changed({"seed": 1}), images, 12_800), crops)
    assert sorted(crops[0].tolist()) == list(range(512))
    assert len(set(crops[1].tolist())) == 9  # augmented as in training
    assert calibration_sample(small, images, 100).shape == (4, 100)
