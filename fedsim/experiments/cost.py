"""The cost of runs and studies, estimated without running them."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from fedsim.config import Config, Mode, current_names
from fedsim.data.datasets import image_shape, training_images
from fedsim.experiments.study import read_study, study_names
from fedsim.models import cpu_model
from fedsim.training.centralized import whole_epochs
from fedsim.training.run_plan import run_plan

REFERENCE_FLOPS = 100e9  # FLOP/s of training on two CPU cores: the paper's model at 535 images/s


class Cost(NamedTuple):
    """Training images computed in a run (repeats included), local steps of one worker, and syncs."""

    images: float
    local_steps: int
    syncs: int


def cost(config: Config, mode: Mode) -> Cost:
    """The cost of a complete run of `config`."""
    images = training_images(config)
    if mode == "centralized":
        epochs, _ = whole_epochs(config)
        return Cost(float(epochs * images), epochs * -(-images // config.batch_size), 0)
    plan = run_plan(config, images)
    steps = plan.first_step(plan.rounds + 1)
    return Cost(float(steps * config.clients_per_round * config.batch_size), steps, plan.rounds)


def flop_per_image(config: Config) -> float:
    """Floating-point operations per image of a training step, in convolutions and matrix products."""
    network, images = cpu_model(config), torch.zeros(1, *image_shape(config))
    with FlopCounterMode(display=False) as counter:
        network.eval()(images).sum().backward()
    return float(counter.get_total_flops())


def measured_rates(results: Path) -> dict[tuple[str, str], float]:
    """Images trained per second by model and precision: the median of the finished runs under `results`.

    Runs of less than 10 seconds do not count, since most of their time is start-up.
    """
    rates: dict[tuple[str, str], list[float]] = {}
    for folder in (Path(name) for name, _, files in os.walk(results.expanduser()) if "summary.json" in files):
        try:
            summary, keys = (json.loads((folder / f"{kind}.json").read_text()) for kind in ("summary", "config"))
            known = {name: value for name, value in current_names(keys).items() if name != "mode"}
            config = Config().changed(known)
            rate = summary["epoch"] * training_images(config) / summary["seconds"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError):
            continue  # the report warns of damaged records
        if summary["finished"] and summary["seconds"] >= 10:
            rates.setdefault((config.model, config.precision), []).append(rate)
    return {kind: statistics.median(found) for kind, found in rates.items()}


def list_studies(seeds: Sequence[int], results: Path) -> Iterator[str]:
    """The lines of a list of the studies that come with fedsim, with their costs."""
    rates = measured_rates(results)
    measured = ", ".join(f"{rate:,.0f} images/s ({model}, {kind})" for (model, kind), rate in sorted(rates.items()))
    for study in map(read_study, study_names()):
        images, steps, syncs, seconds = 0.0, 0, 0, 0.0
        for _, mode, config in (cells := study.cells(seeds)):
            run = cost(config, mode)
            kind = config.model, config.precision
            if kind not in rates:
                rates[kind] = REFERENCE_FLOPS / flop_per_image(config)
            images, steps, syncs = images + run.images, steps + run.local_steps, syncs + run.syncs
            seconds += run.images / rates[kind]
        yield f"{study.name}: {study.title}"
        yield (
            f"    {len(cells)} runs (seed {', '.join(map(str, seeds or study.seeds))}): {images:,.0f} images, "
            f"{steps:,} local steps, {syncs:,} syncs, {seconds / 3600:,.1f} hours"
        )
    median = f"the median rate of finished runs in {results}, {measured}; else at " if measured else ""
    yield f"Hours: one run after the other, at {median}{REFERENCE_FLOPS / 1e9:g} GFLOP/s."
