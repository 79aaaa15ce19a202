"""The strategy of a run: its methods, and what the server knows of what clients send."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import nn

from fedsim.config import Config
from fedsim.data.datasets import task_of, training_examples
from fedsim.data.partition import shard_sizes
from fedsim.federation.protocol import MEMORY
from fedsim.federation.shapes import domains, zeros_of
from fedsim.training.methods import fewest_updates, layers_of, mean_of
from fedsim.training.run_plan import RunPlan
from fedsim.training.topology import rows_of, topology_of
from strategies.domain import Domain
from strategies.local_sgd import LocalSGD, Seen, Usable
from strategies.sections import Sections, join


def build_strategy(
    config: Config, plan: RunPlan, model: nn.Module, images: Mapping[int, int] | None = None
) -> LocalSGD:
    """The strategy of `config` (checked) for the arrays of `model`.

    `images`: how many each worker holds, where it weighs by them (by default as many as its shard). They are read when
    an update is screened.
    """
    shards, mean = shard_sizes(config), mean_of(config)
    layers = layers_of(config, server=True, decided=plan.decided)
    zero = zeros_of(config, model)
    names = join(Sections(zero.parameters, zero.buffers, layers.messages(zero))).keys()

    def planned(round_: int, worker: int) -> Domain:
        if not mean.by_shards:
            trained = len(plan.samples(round_, shards[worker]))
            return Domain(trained, trained)
        held = shards[worker] if images is None else images[worker]
        return Domain(held, min(held, training_examples(config)))

    rows = None if topology_of(config).one_model else functools.partial(rows_of, config)
    return LocalSGD(
        seed=config.seed,
        population=config.clients,
        fraction_train=config.fraction,
        usable=Usable(
            least=fewest_updates(config),
            examples=planned,
            metrics={"train-loss": task_of(config).loss_domain},
            domains=lambda round_: domains(names, zero.batchnorm, layers, plan.first_step(round_ + 1)),
            other_records=[MEMORY],
            away=None if plan.turns.workers.always_there else plan.turns.away,
        ),
        layers=layers,
        seen=Seen(mean, zero.batchnorm, lambda round_: plan.rates(round_)[-1], plan.is_tested, rows),
    )
