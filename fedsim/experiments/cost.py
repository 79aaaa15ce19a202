"""Estimate what runs and studies cost, without running them."""

from __future__ import annotations

import collections
import itertools
import os
import statistics
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from fedsim.config import Config, Mode
from fedsim.data.datasets import recorded_examples, task_of
from fedsim.data.partition import examples_of, images_of_epoch, shard_sizes
from fedsim.data.task import with_floats
from fedsim.experiments.study import Cell, Study, read_study, study_names
from fedsim.federation.decisions import planned
from fedsim.federation.lengthen import open_run
from fedsim.federation.strategy import build_strategy
from fedsim.federation.traffic import messages_of
from fedsim.models import cpu_model
from fedsim.runs.folder import CONFIG, read_config
from fedsim.runs.records import read_rows, read_summary
from fedsim.training.centralized import whole_epochs
from fedsim.training.local_steps import local_steps_schedule
from fedsim.training.topology import rows_of, topology_of
from fedsim.training.workers import workers_of

SHORT_SECONDS = 10.0
REFERENCE_FLOPS = 100e9  # FLOP/s of training on two CPU cores: the paper's model at 535 images/s
KEPT = Path(__file__).parents[2] / "results"  # that come with a checkout
Kind = tuple[str, str, str]  # of runs that have one pace


class Cost(NamedTuple):
    """Training images of a run (counted once per pass), local steps of one worker, and syncs."""

    images: float
    local_steps: int
    syncs: int


def cost(config: Config, mode: Mode) -> Cost:
    """The cost of a complete run of `config`."""
    images = images_of_epoch(config, mode)
    if mode == "centralized":
        epochs, _ = whole_epochs(config)
        return Cost(float(epochs * images), epochs * -(-images // config.batch_size), 0)
    plan = planned(config)
    trained = float(plan.epoch(plan.rounds) * images)
    if config.workers != "even":
        held = shard_sizes(config)
        trained = sum(
            len(plan.trained(round_, worker, held[worker]))
            for round_, workers in enumerate(sampled(config), 1)
            for worker in workers
        )
    return Cost(trained, plan.first_step(plan.rounds + 1), plan.rounds)


def sampled(config: Config) -> Iterator[list[int]]:
    """The workers of each round of a complete run of LocalSGD."""
    plan, everyone = planned(config), list(range(config.clients))
    strategy = build_strategy(config, plan, cpu_model(config))
    return (strategy.sample(round_, everyone) for round_ in range(1, plan.rounds + 1))


class Traffic(NamedTuple):
    """The bytes that all clients together send (up) and receive (down)."""

    up: int
    down: int


def traffic(config: Config) -> tuple[Traffic, Traffic]:
    """The traffic of a complete run of LocalSGD, and the most of a round; as in rows, the first model is not in this.

    Not counted: rounds that are repeated, and the clients' states that are sent for checkpoints. Each client is assumed
    to have been in the round before, except in the first.
    """
    rounds, of_client = planned(config).rounds, messages_of(config)
    counts = itertools.repeat(config.clients_per_round, rounds)
    up = down = peak_up = peak_down = 0
    for round_, workers in enumerate(counts if workers_of(config).always_there else map(len, sampled(config)), 1):
        one = of_client.in_round(round_)
        up, peak_up = up + workers * one.up, max(peak_up, workers * one.up)
        down, peak_down = down + workers * one.down, max(peak_down, workers * one.down if round_ > 1 else 0)
    return Traffic(up, down), Traffic(peak_up, peak_down)


class Links(NamedTuple):
    """The bytes between the clients of a topology, if they sent their models to each other, without a server.

    A link goes from one client to another.
    """

    used: int  # links over which anything is sent
    least: int  # over one of these in the run
    most: int
    to_one: int  # the most that a client gets in a round


def links(config: Config) -> Links:
    """What the links between clients would carry in a complete run of LocalSGD."""
    sent, of_client = collections.Counter[tuple[int, int]](), messages_of(config)
    to_one = 0
    for round_, there in enumerate(sampled(config), 1):
        rows, one = rows_of(config, round_), of_client.in_round(round_)
        for worker in there:
            others = [other for other in there if other != worker and rows[worker].get(other)]
            sent.update(dict.fromkeys(((other, worker) for other in others), one.up))
            to_one = max(to_one, len(others) * one.up)
    return Links(len(sent), min(sent.values(), default=0), max(sent.values(), default=0), to_one)


def flop_per_image(config: Config) -> float:
    """Floating-point operations of a training step per image, counting convolutions and matrix products."""
    network, task = cpu_model(config).eval(), task_of(config)
    batch = with_floats(task.trial(config, 1), torch.float32)
    with FlopCounterMode(display=False) as counter:
        task.loss(task.forward(network, batch), batch[1]).backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops())


def measured_rates(results: Path) -> dict[Kind, float]:
    """Images per second for each kind of run: the median over the finished runs under `results`.

    Of a run of less than `SHORT_SECONDS`, which are mostly those of its first row, the rows after that count alone.
    """
    rates: dict[Kind, list[float]] = {}
    for folder in (Path(name) for name, _, files in os.walk(results.expanduser()) if "summary.json" in files):
        try:
            summary = read_summary(folder) or {}
            held = read_config(folder)
            config = Config().changed({name: held[name] for name in Config().identity(held["mode"])})
            recorded_examples(config)
            first = read_rows(folder)[0] if summary["seconds"] < SHORT_SECONDS else {"epoch": 0.0, "seconds": 0.0}
            images = (summary["epoch"] - first["epoch"]) * images_of_epoch(config, held["mode"])
            rate = images / (summary["seconds"] - first["seconds"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError):
            continue  # damaged: the report warns of it; or of a function's images
        if summary["finished"] and rate > 0:
            rates.setdefault(_kind(config), []).append(rate)
    return {kind: statistics.median(found) for kind, found in rates.items()}


def _kind(config: Config) -> Kind:
    """What the pace of a run depends on most: its model, its precision, and whether it runs on cpu or cuda."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return config.model, config.precision, config.device.replace("auto", auto).partition(":")[0]


class Pace:
    """Predicts the time of runs: from the finished ones in the first of `folders` with their kind, or else by FLOP."""

    def __init__(self, *folders: Path) -> None:
        self._rates: dict[Kind, float] = {}
        self._parts: list[str] = []
        for folder in dict.fromkeys(folders):
            new = {kind: rate for kind, rate in measured_rates(folder).items() if kind not in self._rates}
            measured = ", ".join(f"{rate:,.0f} images/s ({', '.join(kind)})" for kind, rate in sorted(new.items()))
            of = ", perhaps of another machine" if folder == KEPT else ""
            self._parts += [f"the median rate of finished runs in {folder}{of}, {measured}"] if new else []
            self._rates |= new
        self._parts.append(f"{REFERENCE_FLOPS / 1e9:g} GFLOP/s.")

    def seconds(self, config: Config, images: float) -> float:
        """The time in which a run of `config` trains on so many images."""
        kind = _kind(config)
        if kind not in self._rates:
            self._rates[kind] = REFERENCE_FLOPS / flop_per_image(config)
        return images / self._rates[kind]

    def __str__(self) -> str:
        """What the times are based on."""
        return f"one run after the other, at {'; else at '.join(self._parts)}"


def plan_lines(cells: Sequence[Cell], pace: Pace) -> Iterator[str]:
    """A line on the cost of each of `cells` (resolved), and one on all that are not finished yet."""
    total, most = 0.0, max((len(cell.config.name) for cell in cells), default=0)
    for cell in cells:
        _, mode, config = cell
        run, state = cost(config, mode), _state(cell)
        seconds = pace.seconds(config, run.images)
        total += seconds if state != "finished" else 0.0
        parts = [f"{run.local_steps:,} local steps", f"{run.images:,.0f} {examples_of(config)}"]
        if mode == "localsgd":
            whole, peak = traffic(config)
            sent = [f"{whole.up / 1e6:,.1f} MB up", f"{whole.down / 1e6:,.1f} MB down"]
            of_round = f"in a round at most {peak.up / 1e6:,.3f} MB up, {peak.down / 1e6:,.3f} MB down"
            about = "about " * local_steps_schedule(config).decides  # while it trains
            rounds = f"{about}{run.syncs:,} round{'s' * (run.syncs != 1)}"
            parts = [rounds, *parts, *sent, of_round, *_between_clients(config)]
        yield f"{config.name:{most}}  {state}: {', '.join(parts)}, {_duration(seconds)}"
    yield f"{len(cells)} run{'s' * (len(cells) > 1)}; those not finished take {_duration(total)} ({pace})"


def _between_clients(config: Config) -> Iterator[str]:
    """What the links of the topology of `config` would carry; nothing where all clients have one model."""
    if topology_of(config).one_model:
        return
    found = links(config)
    each = " to ".join(f"{amount / 1e6:,.1f}" for amount in sorted({found.least, found.most}))
    yield (
        f"without a server {found.used:,} links between clients of {each} MB each, and in a round at most "
        f"{found.to_one / 1e6:,.3f} MB to one client"
    )


def _state(cell: Cell) -> str:
    """Whether a cell is new, begun or finished; raises UserError if its folder holds another run."""
    if not (cell.folder / CONFIG).exists():
        return "new"
    return "finished" if open_run(cell.config, cell.mode).finished else "begun"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def list_studies(seeds: Sequence[int], pace: Pace) -> Iterator[str]:
    """Lines on the studies that come with fedsim, by the question that they answer, and their costs."""
    by_question: dict[str, list[Study]] = {}
    for study in map(read_study, study_names()):
        by_question.setdefault(study.question, []).append(study)
    for question, studies in by_question.items():
        yield question or "Others"
        yield from (line for study in studies for line in _study_lines(study, seeds, pace))
        yield ""
    yield f"Hours: {pace}"


def _study_lines(study: Study, seeds: Sequence[int], pace: Pace) -> Iterator[str]:
    """The title of a study, and a line on its cost."""
    images, steps, syncs, seconds, what = 0.0, 0, 0, 0.0, ""
    for _, mode, config in (cells := study.cells(seeds)):
        run = cost(config, mode)
        images, steps, syncs = images + run.images, steps + run.local_steps, syncs + run.syncs
        seconds, what = seconds + pace.seconds(config, run.images), examples_of(config)
    yield f"{study.name}: {study.title}"
    yield (
        f"    {len(cells)} runs (seed {', '.join(map(str, seeds or study.seeds))}): {images:,.0f} {what}, "
        f"{steps:,} local steps, {syncs:,} syncs, {seconds / 3600:,.1f} hours"
    )
