"""Run the local steps of a round from static buffers, so that a CUDA graph can capture a step.

`step.run_steps` is the same in its simple form. Here the inputs of a round are copied to the device at once, and each
step selects its own by a counter on the device. It draws its batch, runs forward and backward, takes the optimizer's
step and stores its loss without synchronizing. On a GPU the step is captured once and replayed for every step;
elsewhere its operations run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.data.datasets import task_of
from fedsim.data.task import Examples, with_floats
from fedsim.models.dropout import StepKeys, set_dropout_keys
from fedsim.optim import is_capturable, load_optimizer_state, optimizer_state, set_lr
from fedsim.training.step import Learner, StepInputs, take_step

WARM_UP = 3  # steps before a capture, in which CUDA's libraries choose their kernels


class CapturedSteps:
    """Runs rounds of at most `samples` examples for each of the learner's K replicas.

    The last batch of a round may be smaller. Once this is built, weights and optimizer state may only be changed in
    place; building it with `capture` takes warm-up steps, and then restores both.
    """

    def __init__(
        self, learner: Learner, examples: Examples, samples: int, batch_size: int, capture: bool = False
    ) -> None:
        self._learner, self._examples, self._batch_size = learner, examples, batch_size
        self._device, self._dtype = examples.device, next(learner.model.parameters()).dtype
        steps, replicas = -(-samples // batch_size), learner.replicas
        # CUDA's fused SGD reads its rate as a float32; in float64 the CPU's bits are those of a Python float
        rate_dtype = torch.float64 if self._device.type == "cpu" else torch.float32
        self._drawn = torch.zeros(examples.draws, replicas, samples, dtype=torch.int64, device=self._device)
        self._rates = torch.zeros(steps, dtype=rate_dtype, device=self._device)
        self._keys = torch.zeros(steps, replicas, dtype=torch.int64, device=self._device)
        self._losses = torch.zeros(steps, replicas, dtype=self._dtype, device=self._device)
        self._shares = torch.zeros(steps, 1, dtype=torch.float64, device=self._device)  # each step's, of the samples
        self._within = torch.arange(batch_size, device=self._device)
        self._step = torch.zeros(1, dtype=torch.int64, device=self._device)  # of the round, the next to be taken
        self._lr = torch.zeros((), dtype=rate_dtype, device=self._device)
        self._step_keys = StepKeys(replicas, self._device)
        set_lr(learner.optimizer, self._lr)
        set_dropout_keys(learner.model, self._step_keys)
        self._captured = self._capture() if capture else None

    def run(self, inputs: Sequence[StepInputs]) -> Tensor:
        """Every step of a round; (K,) the replicas' mean losses over its samples, returned without synchronizing.

        `inputs`: of each replica; their rates, and how many steps there are, are the same.
        """
        samples = inputs[0].drawn.shape[1]
        full, rest = divmod(samples, self._batch_size)
        sizes = [self._batch_size] * full + [rest] * (rest > 0)
        steps = len(sizes)
        self._fill(self._drawn[:, :, :samples], torch.stack([replica.drawn for replica in inputs], dim=1))
        self._fill(self._keys[:steps], torch.stack([replica.dropout_keys for replica in inputs], dim=1))
        self._fill(self._rates[:steps], torch.tensor(inputs[0].rates, dtype=self._rates.dtype))
        self._fill(self._shares[:steps], torch.tensor(sizes, dtype=torch.float64)[:, None] / samples)
        self._step.zero_()
        self._learner.model.train()
        for size, *keys in zip(sizes, *(replica.augment_keys for replica in inputs), strict=True):
            if self._captured and size == self._batch_size:
                self._captured()
            else:
                self._take(size, keys)
        return (self._losses[:steps] * self._shares[:steps]).sum(0)

    def _fill(self, buffer: Tensor, values: Tensor) -> None:
        """One copy that is not waited for, where pinned memory makes that possible."""
        if self._device.type == "cuda":
            values = values.pin_memory()
        buffer.copy_(values, non_blocking=True)

    def _take(self, size: int, keys: Sequence[int] = ()) -> None:
        """The next step, on `size` examples of each replica; `keys`: the replicas', for what else is drawn."""
        columns = self._step * self._batch_size + self._within[:size]
        drawn = self._drawn.index_select(2, columns).flatten(1)  # (draws, K * size)
        batch = self._examples.batch(drawn, keys, self._learner.replicas)
        self._step_keys.begin_step(self._keys.index_select(0, self._step).squeeze(0))
        self._lr.copy_(self._rates.index_select(0, self._step).squeeze(0))
        losses = take_step(self._learner, with_floats(batch, self._dtype))
        self._losses.index_copy_(0, self._step, losses.view(1, -1).to(self._dtype))
        self._step.add_(1)

    def warm_up(self) -> None:
        """Warm-up steps: allocate the optimizer state that a capture needs, then restore weights and state."""
        model, optimizer = self._learner.model, self._learner.optimizer
        parameters = {str(i): p for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        state = optimizer_state(parameters, optimizer)
        self._learner.model.train()
        for _ in range(WARM_UP):
            self._take(self._batch_size)
            self._step.zero_()
        model.load_state_dict(weights)
        load_optimizer_state(parameters, optimizer, state)

    def _capture(self) -> Callable[[], None]:
        """A step as a CUDA graph: warmed up and captured on a stream of its own, replayed on whichever is current."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self.warm_up()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._take(self._batch_size)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        return graph.replay


def capturable(config: Config) -> bool:
    """Whether a step of `config` can be a CUDA graph, with its batch drawn on the device."""
    return is_capturable(config) and config.device.startswith("cuda") and task_of(config).is_capturable(config)
