"""What a client does in a round: J local steps on its shard, from the global weights and its optimizer's state."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsim.config import Config
from fedsim.data.datasets import load_dataset, task_of
from fedsim.data.local_folder import own_images
from fedsim.data.partition import is_iid, sample_order, shard_of
from fedsim.data.task import Examples
from fedsim.data.uneven import partition_of, uneven_shards
from fedsim.device import prepare
from fedsim.errors import UserError
from fedsim.models import builder_of, initial_model
from fedsim.optim import build_optimizer, load_optimizer_state, optimizer_state
from fedsim.system.copies import copies, fill
from fedsim.training.gradient_terms import gradient_terms
from fedsim.training.local_steps import Decisions
from fedsim.training.methods import layers_of
from fedsim.training.run_plan import run_plan
from fedsim.training.step import Learner, StepInputs, step_inputs
from fedsim.training.step_fn import StepFn, make_step_fn


@dataclass(frozen=True)
class RoundStart:
    """Where a worker begins `round`; `constant` is added to the gradient of each parameter, where methods have one.

    `decided`: what the schedule of J has decided so far, where it decides while the run trains.
    """

    worker: int
    round: int
    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    constant: dict[str, Tensor] = field(default_factory=dict)
    decided: Decisions = ()


@dataclass(frozen=True)
class RoundEnd:
    """Where it ends: weights and state of its own, the mean training loss and the `samples_of` the round.

    The loss may be a scalar tensor on a GPU, which has not been waited for. `mean_gradient`: of each parameter, where
    methods ask for it.
    """

    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    loss: float | Tensor
    samples: int
    mean_gradient: dict[str, Tensor] = field(default_factory=dict)


class Replica(NamedTuple):
    """A learner and the function that runs its steps, lent to one client at a time."""

    learner: Learner
    run_steps: StepFn


_of_thread = threading.local()


def take_local_round(config: Config, start: RoundStart) -> RoundEnd:
    """The local steps of one worker; a GPU is not waited for."""
    plan = run_plan(config, start.decided)
    learner, run_steps = _replica(config, plan.max_steps)
    named, optimizer, terms = dict(learner.model.named_parameters()), learner.optimizer, learner.terms
    values = learner.model.state_dict()
    fill(values.values(), (start.weights[name] for name in values))
    load_optimizer_state(named, optimizer, start.state)
    if terms:
        terms.begin(start.constant)
    loss = run_steps(round_inputs(config, start))
    steps = plan.steps_of(start.round, start.worker, len(held_images(config, start.worker)))
    gradients = terms.end(steps) if terms else {}
    return RoundEnd(copies([values])[0], optimizer_state(named, optimizer), loss, samples_of(config, start), gradients)


def local_images(config: Config) -> Examples:
    """The examples that a worker's draws are of: its node's own, or all of the run's."""
    return own_images(config) or load_dataset(config, verify=False).train


def check_machine(config: Config) -> None:
    """Raise UserError where this machine lacks what a worker needs: code of the user's, flwr-datasets, its shard."""
    builder_of(config.model)
    task_of(config).check(config)
    own = own_images(config) is not None
    if own and config.local_epochs:
        raise UserError(
            f"local-epochs = {config.local_epochs}: on a node with images of its own the length of a round is not "
            "known to the others: give local-steps"
        )
    if own and config.evaluate_clients_every:
        raise UserError(
            f"evaluate-clients-every = {config.evaluate_clients_every}: of a node with images of its own it is not "
            "known which share of the test data it has: leave it out"
        )
    if own and partition_of(config).held(0, config.clients) is None:
        raise UserError(
            f"partition = {config.partition}: on a node with images of its own it is not known how many images the "
            "others hold, which an epoch counts: give --partition iid"
        )
    if not is_iid(config) and not own:
        uneven_shards(config)


def held_images(config: Config, worker: int) -> NDArray[np.int64]:
    """Which of `local_images` the worker trains on: all of its node's own, or its shard."""
    own = own_images(config)
    return np.arange(len(own)) if own else shard_of(config, worker)


def round_inputs(config: Config, start: RoundStart) -> StepInputs:
    """What the local steps of a worker's round read."""
    held = held_images(config, start.worker)
    plan = run_plan(config, start.decided)
    first_step, samples = plan.first_step(start.round), plan.trained(start.round, start.worker, len(held))
    order = sample_order(len(held), samples.start, len(samples), config.seed, start.worker, config.shuffle_every)
    rates = plan.rates(start.round)[: plan.steps_of(start.round, start.worker, len(held))]
    return step_inputs(config, start.worker, first_step, rates, local_images(config), held[order])


def samples_of(config: Config, start: RoundStart) -> int:
    """The images that a worker's update counts as: those of a round in which it takes all steps."""
    return len(run_plan(config, start.decided).samples(start.round, len(held_images(config, start.worker))))


def _replica(config: Config, steps: int) -> Replica:
    """This thread's replica for `config`, for rounds of so many steps or fewer.

    As many live as there are threads, however many clients.
    """
    if getattr(_of_thread, "config", None) != config or _of_thread.steps < steps:
        _of_thread.config, _of_thread.steps, _of_thread.replica = config, steps, _build_replica(config, steps)
    replica: Replica = _of_thread.replica
    return replica


def _build_replica(config: Config, steps: int) -> Replica:
    """A replica whose values are not set, and this thread made ready for it."""
    prepare(config)
    model = initial_model(config)
    named = dict(model.named_parameters())
    optimizer, terms = build_optimizer(config, named), gradient_terms(named, layers_of(config).terms)
    learner = Learner(model, optimizer, task_of(config), config.precision, terms, clip=config.clip_grad_norm)
    return Replica(learner, make_step_fn(config, learner, local_images(config), steps * config.batch_size))
