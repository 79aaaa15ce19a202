"""How one model runs its local steps: one by one, or on a GPU as replays of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from fedsim.config import Config
from fedsim.data.task import Examples
from fedsim.training.cuda_graph import CapturedSteps, capturable
from fedsim.training.step import Learner, StepInputs, run_steps

StepFn = Callable[[StepInputs], Tensor | float]


def make_step_fn(config: Config, learner: Learner, examples: Examples, samples: int) -> StepFn:
    """The function that runs the steps on `samples` examples on the device of `config` and returns the mean loss.

    On a GPU it does not wait for the device; elsewhere it is `run_steps`.
    """
    if not config.device.startswith("cuda"):
        return partial(run_steps, learner, examples, config.batch_size)
    captured = CapturedSteps(learner, examples, samples, config.batch_size, capturable(config))
    return lambda inputs: captured.run([inputs])
