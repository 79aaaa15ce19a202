"""A baseline of `bench`: a straightforward LocalSGD in plain PyTorch.

Each client has a DataLoader with torchvision's per-image transforms, a model and an optimizer. Clients train one after
the other, and parameters are averaged in place. It uses no engine of fedsim.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

from fedsim.config import Config
from fedsim.data.image_sets import load_images
from fedsim.data.official import CIFAR100
from fedsim.data.partition import shard
from fedsim.models import build_model

TRANSFORM = transforms.Compose(
    [
        transforms.RandomCrop(32, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(*CIFAR100),
    ]
)


class PilImages(Dataset[tuple[Tensor, int]]):
    """Images as torchvision's CIFAR100 returns them: one transformed PIL image at a time."""

    def __init__(self, pixels: NDArray[np.uint8], labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return TRANSFORM(Image.fromarray(self.pixels[index])), self.labels[index]


class PlainClient:
    """The model of a client, its optimizer, and a DataLoader over its shard of `images`."""

    def __init__(self, config: Config, model: nn.Module, images: PilImages, client: int) -> None:
        own = shard(len(images), config.clients, client, config.seed)
        self.config, self.samples = config, len(own)
        self.model = model.to(config.device).to(memory_format=torch.contiguous_format).train()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            config.lr,
            config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.choice("optimizer").arguments["nesterov"],
        )
        self.loader = DataLoader(Subset(images, own.tolist()), config.batch_size, shuffle=True)

    def local_steps(self) -> Iterator[Tensor]:
        """Take J local steps; yields the loss of each."""
        device = self.config.device
        for inputs, labels in itertools.islice(itertools.cycle(self.loader), self.config.local_steps):
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(inputs.to(device)), labels.to(device))
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            yield loss


def plain_rounds(config: Config, rounds: int) -> list[float]:
    """Seconds of each of `rounds` rounds, after a warm-up round."""
    torch.set_num_threads(config.threads)
    data = load_images(config)
    images = PilImages(data.train.pixels(), data.train.labels.cpu())
    model = build_model(config.model, data.classes, config.seed)
    clients = [PlainClient(config, copy.deepcopy(model), images, k) for k in range(config.clients)]
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        for client in clients:
            for loss in client.local_steps():
                loss.item()
        _average([client.model for client in clients])
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


@torch.no_grad()
def _average(models: list[nn.Module]) -> None:
    for values in zip(*(m.state_dict().values() for m in models), strict=True):
        mean = torch.stack([value.float() for value in values]).mean(0)
        for value in values:
            value.copy_(mean)
