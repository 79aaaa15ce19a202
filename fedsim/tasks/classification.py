"""Image classification: crops, mirrored images, cross-entropy, accuracy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.config import Config
from fedsim.data.augment import check_augment
from fedsim.data.image_sets import (
    augmentation_of,
    digests_of_images,
    facts_of,
    image_shape,
    load_images,
    verify_image_files,
)
from fedsim.data.images import Images, ImageShape, images_like
from fedsim.data.metric import ACCURACY
from fedsim.data.task import Batch, Dataset, Task, by


class Classification(Task):
    """(B, C, H, W) images -> (B, classes) logits."""

    metric = ACCURACY
    of_images = stacks = True

    def training_examples(self, config: Config) -> int:
        return facts_of(config).images

    def whole(self, config: Config) -> Dataset[Images]:
        return load_images(config)

    def digests(self, config: Config) -> dict[str, str]:
        return digests_of_images(config)

    def verify(self, config: Config) -> None:
        verify_image_files(config)

    def check(self, config: Config) -> None:
        check_augment(config, image_shape(config))

    def is_capturable(self, config: Config) -> bool:
        return not augmentation_of(config).own

    def outputs(self, config: Config) -> int:
        return facts_of(config).classes

    def shape(self, config: Config) -> ImageShape:
        return image_shape(config)

    def trial(self, config: Config, count: int) -> Batch:
        return images_like(count, image_shape(config)), torch.zeros(count, dtype=torch.int64)

    def taken(self, config: Config) -> str:
        return f"the images of {config.dataset}, {by(image_shape(config))}"

    def problem(self, config: Config, outputs: Any) -> str:
        classes = facts_of(config).classes
        wanted = f"{by((2, classes))} logits for two of them"
        if not isinstance(outputs, Tensor):
            return f"it gives {type(outputs).__name__}, not a tensor of {wanted}"
        if tuple(outputs.shape) == (2, classes):
            return ""
        if outputs.ndim == 2 and len(outputs) == 2:
            return f"it gives {outputs.shape[1]} logits per image, but the data has {classes} classes"
        return f"it gives {by(outputs.shape)}, not {wanted}"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def losses(self, outputs: Tensor, targets: Tensor, replicas: int) -> Tensor:
        each = F.cross_entropy(outputs.flatten(0, 1), targets, reduction="none")
        return each.view(replicas, -1).mean(1)

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        loss = F.cross_entropy(outputs, targets, reduction="sum")
        return {"loss": loss.double(), "accuracy": self.values(outputs, targets).sum().double()}

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.argmax(1) == targets
