"""The one training step of both modes, and the test of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fedsim.data.images import Images
from fedsim.device import products_in, thread_pool
from fedsim.optim import set_lr

TEST_BATCH = 250  # images on a CPU; larger ones outgrow a core's cache
GPU_TEST_BATCH = 2500  # smaller ones leave a GPU waiting for their launches


def take_steps(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    lr: Callable[[int], float],
    first_step: int,
    precision: str = "fp32",
) -> float:
    """One optimizer step on each batch; returns the mean training loss over their samples.

    `lr` gives the rate of a local step, counted from `first_step` on. The loss of a batch is the one before
    its step, in train mode. The device is waited for once, at the end.
    """
    model.train()
    parameter = next(model.parameters())
    losses, sizes = [], []
    for step, (images, labels) in enumerate(batches, first_step):
        set_lr(optimizer, lr(step))
        losses.append(take_step(model, optimizer, images.to(parameter.dtype), labels, precision))
        sizes.append(len(labels))
    sums = torch.stack(losses).double().cpu() * torch.tensor(sizes)
    return float(sums.sum()) / sum(sizes)


def take_step(
    model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor, precision: str, replicas: int = 1
) -> Tensor:
    """One optimizer step on a batch; returns its mean loss before the step, for which nothing has waited.

    For K `replicas` side by side, `labels` are (K * B,) and the losses (K,).
    """
    model.zero_grad(set_to_none=replicas == 1)  # the gradients of replicas are parts of stacked ones
    with products_in(precision, images.device):
        logits = model(images)
        if replicas == 1:
            losses = F.cross_entropy(logits, labels)
        else:
            each = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
            losses = each.view(replicas, -1).mean(1)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return losses.detach()


def evaluate(model: nn.Module, images: Images, precision: str = "fp32") -> tuple[float, float]:
    """Mean cross-entropy and accuracy (a fraction) of `model`, in eval mode, over all `images`.

    On the CPU each core tests batches of its own on one thread, so that the result is the same on any number.
    """
    model.eval()
    parameter = next(model.parameters())
    batch = TEST_BATCH if parameter.device.type == "cpu" else GPU_TEST_BATCH

    @torch.inference_mode()
    def test(start: int) -> tuple[Tensor, Tensor]:
        inputs, labels = images.plain(start, start + batch)
        with products_in(precision, parameter.device):
            logits = model(inputs.to(parameter.dtype))
            loss_sum = F.cross_entropy(logits, labels, reduction="sum")
        return loss_sum.double(), (logits.argmax(1) == labels).sum()

    with thread_pool(images.labels.device, threads=1) as pool:
        losses, correct = zip(*pool.map(test, range(0, len(images), batch)), strict=True)
    return float(sum(losses)) / len(images), int(sum(correct)) / len(images)
