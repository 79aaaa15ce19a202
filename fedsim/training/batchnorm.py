"""BatchNorm's running statistics, re-estimated on training images once the weights are averaged."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsim.config import Config
from fedsim.data.task import Examples, Task, with_floats
from fedsim.device import products_in, thread_pool
from fedsim.rng import generator, random_words, step_keys

STATISTICS = ("running_mean", "running_var")
BATCH = 128  # examples; the same for every K, since the variance within a batch depends on its size


def calibration_sample(config: Config, examples: Examples, count: int) -> Tensor:
    """(draws, N) what is drawn for `count` of the training `examples`, or all of fewer, in whole batches.

    Augmented as in training, and a function of the seed alone: the same at every test, whatever K and J.
    """
    count = min(count, len(examples))
    count -= count % BATCH if count > BATCH else 0
    chosen = generator(config.seed, 0, 0, "batchnorm").permutation(len(examples))[:count]
    words = random_words(step_keys(config.seed, 0, 0, 1, "batchnorm"), count)
    return examples.sample(chosen, words[0])


def reestimate(task: Task, model: nn.Module, examples: Examples, drawn: Tensor, precision: str = "fp32") -> None:
    """Set the running statistics of `model` to the means over batches of `examples` of those of each batch.

    A batch passes through BatchNorm in train mode and everything else in eval mode, so dropout is off as in a test. On
    the CPU each core takes batches of its own on one thread, and their float64 mean is taken in order: the result is
    the same on any number. Without dropout it is that of `torch.optim.swa_utils.update_bn` (Izmailov et al. 2018).
    """
    if not _layers(model):
        return
    parameter = next(model.parameters())

    @torch.no_grad()
    def statistics(start: int) -> list[Tensor]:
        replica = copy.deepcopy(model).eval()
        for layer in _layers(replica):
            layer.train()
            layer.momentum = 1.0  # the statistics of this batch alone
        batch = examples.batch(drawn[:, start : start + BATCH].to(examples.device), [start])
        with products_in(precision, parameter.device):
            task.forward(replica, with_floats(batch, parameter.dtype))
        return [layer.get_buffer(name) for layer in _layers(replica) for name in STATISTICS]

    starts = range(0, drawn.shape[1], BATCH)
    if parameter.device.type == "cpu":
        with thread_pool(parameter.device, threads=1) as pool:
            per_batch = list(pool.map(statistics, starts))
    else:  # in this thread, for which cuDNN keeps its convolution plans
        per_batch = list(map(statistics, starts))
    of_batches = zip(*per_batch, strict=True)
    means = iter([torch.stack(values).double().mean(0) for values in of_batches])
    for layer in _layers(model):
        for name in STATISTICS:
            layer.get_buffer(name).copy_(next(means))
        layer.get_buffer("num_batches_tracked").fill_(len(starts))


def _layers(model: nn.Module) -> list[_BatchNorm]:
    """The layers that track running statistics."""
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
