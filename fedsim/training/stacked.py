"""The rounds of a group of K workers at once, their replicas stacked into one network.

`models.stack` makes the network. LARS and LAMB see each replica's part of a stacked parameter as a parameter of its
own, so that norms stay the workers' own; SGDM, which treats each value apart, sees the stacked one. A round is
`local_round.take_local_round` of each worker, up to the rounding of the kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedsim.config import Config
from fedsim.data.datasets import load_dataset, task_of
from fedsim.data.partition import shard_sizes
from fedsim.device import prepare
from fedsim.errors import UserError
from fedsim.models import build_model, builder_of, initial_model
from fedsim.models.stack import CannotStack, check_stack, stack
from fedsim.optim import build_optimizer, load_optimizer_state, optimizer_state
from fedsim.system.copies import copies, fill
from fedsim.training.cuda_graph import CapturedSteps, capturable
from fedsim.training.gradient_terms import gradient_terms
from fedsim.training.local_round import RoundEnd, RoundStart, held_images, round_inputs, samples_of, take_local_round
from fedsim.training.local_steps import Decisions
from fedsim.training.methods import layers_of
from fedsim.training.run_plan import run_plan
from fedsim.training.step import Learner, StepInputs
from fedsim.training.workers import workers_of


class StackedReplicas:
    """K replicas in one network, and an optimizer that remembers each one's state; a round sets all their values."""

    def __init__(self, config: Config, replicas: int, steps: int, by_products: bool = False) -> None:
        """For rounds of so many `steps` or fewer."""
        prepare(config)
        check_stackable(config, by_products)
        self._config = config
        self._model = stack(initial_model(config), replicas, by_products).to(memory_format=torch.channels_last)
        self._parts = [  # of each replica: views of its parameters
            {name: _split(p.detach(), replicas)[replica] for name, p in self._model.named_parameters()}
            for replica in range(replicas)
        ]
        self._buffers = [
            {name: _split(buffer, replicas)[replica] for name, buffer in self._model.named_buffers()}
            for replica in range(replicas)
        ]
        self._optimizer = self._sgdm() if config.optimizer == "sgdm" else self._optimizer_of_parts()
        self._terms = gradient_terms(dict(self._model.named_parameters()), layers_of(config).terms)
        self._drawn: dict[tuple[int, int, Decisions], StepInputs] = {}  # while the GPU trained the round before
        what = (task_of(config), config.precision, self._terms, replicas, config.clip_grad_norm)
        learner = Learner(self._model, self._optimizer, *what)
        examples, samples = load_dataset(config).train, steps * config.batch_size
        self._steps = CapturedSteps(learner, examples, samples, config.batch_size, capturable(config))

    def take_rounds(self, starts: Sequence[RoundStart]) -> list[RoundEnd]:
        """The local steps of K workers, which are in the same round."""
        names = list(starts[0].weights)
        tensors = [{**parts, **buffers} for parts, buffers in zip(self._parts, self._buffers, strict=True)]
        given = {
            of_replica[name]: start.weights[name]
            for of_replica, start in zip(tensors, starts, strict=True)
            for name in names
        }
        fill(given.keys(), given.values())  # a scalar, which all share, once
        load_optimizer_state(_named(self._parts), self._optimizer, _named([start.state for start in starts]))
        if self._terms:
            constants = [start.constant for start in starts]
            self._terms.begin({name: torch.cat([of[name] for of in constants]) for name in constants[0]})
        losses = self._steps.run(self._inputs(starts))
        weights = copies([{name: of[name] for name in names} for of in tensors])
        for name in filter(lambda name: tensors[0][name].ndim == 0, names):
            own = [start.weights[name].to(weights[-1][name].device) for start in starts]
            if any(value is not own[0] for value in own):  # counters, which the network shares: those of the last one
                counted = weights[-1][name] - own[-1]
                for of, value in zip(weights, own, strict=True):
                    of[name] = value + counted
        states = [optimizer_state(parts, self._optimizer) for parts in self._parts]
        gradients = self._gradients(starts[0])
        self._draw_ahead(starts)
        samples = samples_of(self._config, starts[0])
        return [
            RoundEnd(after, state, loss, samples, means)
            for after, state, loss, means in zip(weights, states, losses.tolist(), gradients, strict=True)  # waits
        ]

    def _inputs(self, starts: Sequence[RoundStart]) -> list[StepInputs]:
        return [self._drawn.get((s.worker, s.round, s.decided)) or round_inputs(self._config, s) for s in starts]

    def _draw_ahead(self, starts: Sequence[RoundStart]) -> None:
        """What the same workers read in the next round, drawn while a GPU is busy; a CPU would gain nothing."""
        following, decided = starts[0].round + 1, starts[0].decided
        ahead = self._config.device.startswith("cuda") and following <= run_plan(self._config, decided).rounds
        self._drawn = {
            (start.worker, following, decided): round_inputs(self._config, replace(start, round=following))
            for start in (starts if ahead else ())
        }

    def _gradients(self, start: RoundStart) -> list[dict[str, Tensor]]:
        """Each replica's mean gradients of the round, where methods ask for them."""
        held = len(held_images(self._config, start.worker))
        steps = run_plan(self._config, start.decided).steps_of(start.round, start.worker, held)
        stacked = self._terms.end(steps) if self._terms else {}
        parts = {name: _split(value, len(self._parts)) for name, value in stacked.items()}
        return [{name: of[replica].clone() for name, of in parts.items()} for replica in range(len(self._parts))]

    def _sgdm(self) -> Optimizer:
        """SGDM over the stacked parameters, in which the parts' momenta are parts of the stacked ones."""
        named = dict(self._model.named_parameters())
        optimizer = build_optimizer(self._config, named)
        for name, parameter in named.items() if self._config.momentum else ():
            momentum = torch.zeros_like(parameter)
            optimizer.state[parameter]["momentum_buffer"] = momentum
            for parts, of_replica in zip(self._parts, _split(momentum, len(self._parts)), strict=True):
                optimizer.state[parts[name]]["momentum_buffer"] = of_replica
        return optimizer

    def _optimizer_of_parts(self) -> Optimizer:
        """An optimizer over the parts, whose gradients are parts of the stacked ones as soon as these are there."""
        for name, parameter in self._model.named_parameters():
            hook = functools.partial(self._split_gradient, name)
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        return build_optimizer(self._config, _named(self._parts))

    def _split_gradient(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        for parts, gradient in zip(self._parts, _split(parameter.grad, len(self._parts)), strict=True):
            parts[name].grad = gradient


def why_not(config: Config, by_products: bool = False) -> str:
    """Why the replicas of `config` cannot be stacked; empty if they can, and then compute what each does alone."""
    if config.local_epochs and len(set(shard_sizes(config))) > 1:
        return f"local-epochs = {config.local_epochs}: clients that hold more images take more steps than others"
    if not workers_of(config).alike:
        return f"workers = {config.workers}: some clients take fewer steps than others"
    builder, task = builder_of(config.model), task_of(config)
    if not task.stacks:
        return f"dataset = {config.dataset}: models of {task.metric.examples} cannot be stacked"
    problem = _why_not(builder, config.model, task.outputs(config), task.shape(config), by_products)
    return f"model {config.model}: {problem}" if problem else ""


@functools.lru_cache(maxsize=8)  # a large model takes seconds
def _why_not(
    builder: Callable[..., nn.Module], name: str, outputs: int, shape: tuple[int, ...], by_products: bool
) -> str:
    try:
        check_stack(lambda: build_model(name, outputs, 0, "cpu", "fp64", shape), shape, by_products)
    except CannotStack as error:
        return str(error)
    return ""


def check_stackable(config: Config, by_products: bool = False) -> None:
    """Raise UserError where the replicas of `config` cannot be stacked."""
    if problem := why_not(config, by_products):
        raise UserError(f"{problem}: give --engine local")


class StackedWorkers:
    """Takes the rounds of a group of workers at once, and keeps the network of their replicas for the next round."""

    def __init__(self, by_products: bool = False) -> None:
        """Convolutions by groups or, with `by_products`, by matrix products."""
        self._replicas = functools.lru_cache(maxsize=1)(functools.partial(StackedReplicas, by_products=by_products))

    def take_rounds(self, config: Config, starts: Sequence[RoundStart]) -> list[RoundEnd]:
        """The local steps of all workers in `starts`, which are in the same round.

        A single worker has nothing to be stacked with.
        """
        if len(starts) == 1:
            return [take_local_round(config, starts[0])]
        steps = run_plan(config, starts[0].decided).max_steps
        return self._replicas(config, len(starts), steps).take_rounds(starts)


def _split(stacked: Tensor, replicas: int) -> list[Tensor]:
    """The replicas' parts of a stacked tensor, along its first dimension; a scalar is shared by all."""
    if stacked.ndim == 0:
        return [stacked] * replicas
    return list(stacked.view(replicas, -1, *stacked.shape[1:]).unbind(0))


def _named(of_replicas: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all replicas, as ``REPLICA/NAME``."""
    return {f"{replica}/{name}": tensor for replica, of in enumerate(of_replicas) for name, tensor in of.items()}
