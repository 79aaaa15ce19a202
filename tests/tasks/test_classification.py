from __future__ import annotations

import torch
from torch.nn import functional as F

from fedsim.tasks.classification import Classification

LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def test_the_losses_of_replicas_are_those_of_each() -> None:
    task = Classification()
    losses = task.losses(LOGITS.view(3, 2, 5), LABELS, 3)
    alone = [task.loss(LOGITS[start : start + 2], LABELS[start : start + 2]) for start in (0, 2, 4)]
    torch.testing.assert_close(losses, torch.stack(alone), rtol=0, atol=1e-15)


def test_the_sums_are_over_the_images() -> None:
    sums = Classification().sums(LOGITS, LABELS)
    assert float(sums["loss"]) == float(F.cross_entropy(LOGITS, LABELS, reduction="sum"))
    assert float(sums["accuracy"]) == sum(int(row.argmax()) == label for row, label in zip(LOGITS, LABELS, strict=True))
