"""Models, data and augmentations of one's own, as a user would write them; tests name them ``tests.own_code:NAME``."""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer


def mlp(classes: int, image: tuple[int, int, int]) -> nn.Module:
    """For images of any shape, with dropout."""
    channels, height, width = image
    inputs = channels * height * width
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, classes))


def vit(classes: int) -> nn.Module:
    """A small transformer of torchvision's, with dropout."""
    return VisionTransformer(32, 8, 1, 2, 8, 16, dropout=0.1, num_classes=classes)  # type: ignore[no-any-return]


def noisy_vit(classes: int) -> nn.Module:
    """Its attention draws dropout of its own."""
    return VisionTransformer(32, 8, 1, 2, 8, 16, attention_dropout=0.1, num_classes=classes)  # type: ignore[no-any-return]


def not_with_batchnorm(classes: int, norm: str = "gn") -> nn.Module:
    """It fails where it is told of another norm than ``gn``."""
    assert norm == "gn"
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, classes))


class Indifferent(nn.Module):
    """Of all classes equally sure, whatever its weights."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(classes))

    def forward(self, images: Tensor) -> Tensor:
        return 0 * self.weight * images.flatten(1)[:, :1]


def constant(classes: int) -> nn.Module:
    """With the same loss in every step."""
    return Indifferent(classes)


def narrow(classes: int, image: tuple[int, int, int]) -> nn.Module:
    """With BatchNorm over single values, which a batch of one image has no variance of."""
    channels, height, width = image
    inputs = channels * height * width
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, classes))


def batchnorm(classes: int, image: tuple[int, int, int]) -> nn.Module:
    """With BatchNorm and dropout, for images of 12 x 12 pixels."""
    return nn.Sequential(
        nn.Conv2d(image[0], 4, 5, stride=4, bias=False),  # before BatchNorm a bias would have a gradient of rounding
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(16, classes),
    )


def small_batchnorm(classes: int) -> nn.Module:
    """As `lenet-bn`, with BatchNorm and dropout, but ten times as fast; for images of any size."""
    layers = {
        "conv1": nn.Conv2d(3, 4, 5, stride=4, bias=False),
        "bn1": nn.BatchNorm2d(4),
        "relu": nn.ReLU(),
        "pool": nn.AdaptiveAvgPool2d(2),
        "flatten": nn.Flatten(),
        "dropout1": nn.Dropout(0.2),
        "fc1": nn.Linear(16, 16),
        "fc3": nn.Linear(16, classes),
    }
    return nn.Sequential(OrderedDict(layers))


def plain(classes: int, image: tuple[int, int, int]) -> nn.Module:
    """The same without BatchNorm and dropout."""
    return nn.Sequential(nn.Conv2d(image[0], 4, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(16, classes))


class Net(nn.Module):
    """A model whose forward pass is a test's."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 32 * 32, classes)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x.flatten(1))


class FunctionalDropout(Net):
    def forward(self, x: Tensor) -> Any:
        return F.dropout(super().forward(x), 0.5, self.training)


class Tuple(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Unused(Net):
    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.extra = nn.Linear(1, 1)


class Frozen(Net):
    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.requires_grad_(False)


class Tied(Net):
    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.other = nn.Linear(3 * 32 * 32, classes)
        self.other.weight = self.fc.weight


class Lazy(Net):
    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.fc = nn.LazyLinear(classes)


class Masked(Net):
    """Its mask has the least value of float32, as those of many transformers."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.register_buffer("mask", torch.full((2,), torch.finfo(torch.float32).min))


class Constant(Net):
    """With a constant that no state_dict holds."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.scale = torch.full((3072,), 0.5)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x.flatten(1) * self.scale)


class Item(Net):
    """Its build reads a value that it has computed."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        nn.init.constant_(self.fc.bias, torch.linspace(0, 1, 3).mean().item())


class Pretrained(Net):
    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.load_state_dict(Net(classes).state_dict())


class WeightNorm(Net):
    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        nn.utils.parametrizations.weight_norm(self.fc)


class SpectralNorm(Net):
    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        nn.utils.parametrizations.spectral_norm(self.fc)


def ten_classes(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 7))


def fails(classes: int) -> nn.Module:
    raise RuntimeError("no weights\nin this file")


def none(classes: int) -> Any:
    return None


not_a_function = 3


def arrays(images: int = 96, shape: tuple[int, int, int] = (12, 10, 1), classes: int = 3) -> dict[str, np.ndarray]:
    """Images whose brightness tells their class."""
    rng = np.random.default_rng(0)
    held: dict[str, np.ndarray] = {}
    for split, count in (("train", images), ("test", images // 4)):
        labels = rng.integers(0, classes, count)
        noise = rng.integers(0, 60, (count, *shape))
        held[f"{split}_images"] = (noise + 60 * labels[:, None, None, None]).astype(np.uint8)
        held[f"{split}_labels"] = labels
    return held


def load() -> dict[str, np.ndarray]:
    return arrays()


def unseeded() -> dict[str, np.ndarray]:
    """Its split is drawn without a seed, as many are."""
    held = arrays()
    order = np.random.default_rng().permutation(96)
    return {**held, "train_images": held["train_images"][order], "train_labels": held["train_labels"][order]}


def of_process() -> dict[str, np.ndarray]:
    """Its labels depend on the process, though not on the call."""
    held = arrays(512)
    return {**held, "train_labels": np.random.default_rng(os.getpid()).permutation(held["train_labels"])}


def larger() -> dict[str, np.ndarray]:
    return arrays(512)


def no_dict() -> Any:
    return [1, 2]


def ragged() -> dict[str, Any]:
    """Images of two sizes."""
    return {**arrays(), "train_images": [np.zeros((12, 10, 1), np.uint8), np.zeros((9, 10, 1), np.uint8)]}


def load_fails() -> Any:
    return torch.load("/nonexistent/file")


def order() -> dict[str, np.ndarray]:
    """A bright token and a dark one, beside each other: their order is their class."""
    rng = np.random.default_rng(0)
    held: dict[str, np.ndarray] = {}
    for split, count in (("train", 256), ("test", 128)):
        labels = rng.integers(0, 2, count)
        bright = np.stack([labels, 1 - labels], axis=1).repeat(6, axis=1)[:, None, :, None]  # (count, 1, 12, 1)
        held[f"{split}_images"] = (rng.integers(0, 60, (count, 10, 12, 1)) + 120 * bright).astype(np.uint8)
        held[f"{split}_labels"] = labels
    return held


def erase(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random column of each image is zero."""
    erased = torch.randint(images.shape[3], (len(images), 1, 1, 1), generator=generator)
    return images * (torch.arange(images.shape[3]) != erased).to(images.device)


def coin(images: Tensor, generator: torch.Generator) -> Tensor:
    """It draws from torch's global generator."""
    return images.flip(3) if torch.rand(()) < 0.5 else images


def cut(images: Tensor, generator: torch.Generator) -> Tensor:
    return images[:, :, 1:]


def doubled(images: Tensor, generator: torch.Generator) -> Tensor:
    return images.double()


def listed(images: Tensor, generator: torch.Generator) -> Any:
    return list(images)


def of_images_alone(images: Tensor) -> Tensor:
    return images


class Tutorial(nn.Module):
    """The network of PyTorch's tutorial on CIFAR-10, to the letter: its `view` takes contiguous tensors alone."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Any:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class Views(nn.Module):
    """A `view` after BatchNorm and dropout, for images of any shape, also grey ones."""

    def __init__(self, classes: int, image: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(image[0], 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(4 * image[1] * image[2], classes)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.dropout(self.norm(self.conv(x))).view(x.shape[0], -1))


class Volumes(Net):
    """With a convolution over three dimensions."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.conv = nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return super().forward(self.conv(x.unsqueeze(1)).squeeze(1))


class Complex(Net):
    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Any:
        return super().forward((x * self.phase.view(3, 1, 1)).real)


class ComplexBuffer(Net):
    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.register_buffer("phase", torch.ones(3, dtype=torch.complex64))


class Empty(Net):
    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.extra = nn.Parameter(torch.zeros(0, 3))


class NoParameters(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: Tensor) -> Any:
        return x.flatten(1)[:, : self.classes]


class Sparse(Net):
    """With sparse gradients."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.embedding = nn.Embedding(256, classes, sparse=True)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) + self.embedding((x[:, 0, 0, 0].abs() * 8).long().clamp(max=255))


class Counting(Net):
    """Its forward pass depends on how often it was called, which is no buffer."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.calls = {"forward": 0}

    def forward(self, x: Tensor) -> Any:
        self.calls["forward"] += 1
        return super().forward(x) * (2 if self.calls["forward"] > 20 else 1)


class TrainedOnMany(Net):
    """It fails on more than the two images that a check tries."""

    def fail(self, x: Tensor) -> None:
        raise ValueError("too many images\nfor this network")

    def forward(self, x: Tensor) -> Any:
        if len(x) > 2:
            self.fail(x)
        return super().forward(x)


class Exits(TrainedOnMany):
    def fail(self, x: Tensor) -> None:
        raise SystemExit(3)


class ExitsAtOnce(Net):
    def forward(self, x: Tensor) -> Any:
        raise SystemExit(3)


class ExitsInEval(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) if self.training else sys.exit(3)


class Huge(TrainedOnMany):
    """It asks torch for more memory than any machine has."""

    def fail(self, x: Tensor) -> None:
        torch.empty(2**50)


class HugeInEval(Huge):
    """It does so in a test."""

    def forward(self, x: Tensor) -> Any:
        return Net.forward(self, x) if self.training else super().forward(x)


class NanInEval(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) if self.training else super().forward(x) * torch.nan
