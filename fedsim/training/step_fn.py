"""How one model runs its local steps: one by one, or on a GPU as replays of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.optim import Optimizer

from fedsim.config import Config
from fedsim.data.images import Images
from fedsim.training.cuda_graph import CapturedSteps, capturable
from fedsim.training.gradient_terms import GradientTerms
from fedsim.training.step import StepInputs, run_steps

StepFn = Callable[[StepInputs], Tensor | float]


def make_step_fn(
    config: Config,
    model: nn.Module,
    optimizer: Optimizer,
    images: Images,
    samples: int,
    terms: GradientTerms | None = None,
) -> StepFn:
    """The function that runs the steps on `samples` images on the device of `config` and returns the mean loss.

    On a GPU it does not wait for the device; elsewhere it is `run_steps`.
    """
    if not config.device.startswith("cuda"):
        return partial(run_steps, model, optimizer, images, config.batch_size, config.precision, terms)
    keys = (samples, config.batch_size, config.precision)
    captured = CapturedSteps(model, optimizer, images, *keys, capture=capturable(config), terms=terms)
    return lambda inputs: captured.run([inputs])
