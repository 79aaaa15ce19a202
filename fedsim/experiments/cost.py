"""Estimate what runs and studies cost, without running them."""

from __future__ import annotations

import collections
import itertools
import math
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
LEAST = "at least "  # of a time by FLOP alone: steps of an optimizer, syncs and tests take some too
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
    """Examples per second for each kind of run: the median over the finished runs under `results`.

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
    """What the pace of a run depends on most: its model, its precision, and whether it runs on cpu or cuda.

    Where its examples are no images, the data set too: it says how long they are.
    """
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    of = "" if task_of(config).of_images else f" on {config.dataset}"
    return f"{config.model}{of}", config.precision, config.device.replace("auto", auto).partition(":")[0]


class Time(NamedTuple):
    """A predicted time in seconds; NaN: nothing is known."""

    seconds: float
    least: bool = False  # whether it is a lower bound

    def __add__(self, other: Time) -> Time:  # type: ignore[override]
        return Time(self.seconds + other.seconds, self.least or other.least)

    def __str__(self) -> str:
        if math.isnan(self.seconds):
            return "unknown time"
        shown = f"{self.seconds:.1f} s" if self.seconds < 60 else str(timedelta(seconds=round(self.seconds)))
        return LEAST * self.least + shown

    @property
    def rounded(self) -> str:
        """In hours, or in minutes where it is less than one."""
        if math.isnan(self.seconds):
            return str(self)
        minutes = math.ceil(self.seconds / 60)
        return LEAST * self.least + (f"{minutes} minutes" if minutes < 60 else f"{self.seconds / 3600:,.1f} hours")


class Pace:
    """Predicts the time of runs: from the finished ones in the first of `folders` with their kind, or else by FLOP.

    Nothing is known of a kind on a GPU that has no finished run.
    """

    def __init__(self, *folders: Path) -> None:
        self._found = {folder: measured_rates(folder) for folder in dict.fromkeys(folders)}
        self._flop: dict[Kind, float] = {}
        self._used: dict[str, dict[Kind, str]] = {}  # what the times are based on -> kinds and their rates

    def time(self, config: Config, examples: float) -> Time:
        """The time in which a run of `config` trains on so many examples."""
        kind, of = _kind(config), examples_of(config)
        for folder, rates in self._found.items():
            if kind in rates:
                of_another = ", perhaps of another machine" if folder == KEPT else ""
                source = f"the median rate of finished runs in {folder}{of_another}"
                self._used.setdefault(source, {})[kind] = f"{rates[kind]:,.0f} {of}/s"
                return Time(examples / rates[kind])
        if kind[2] != "cpu":
            self._used.setdefault("an unknown rate, as no run of its kind is finished", {})[kind] = ""
            return Time(math.nan)
        if kind not in self._flop:
            self._flop[kind] = flop_per_image(config)
        rate = REFERENCE_FLOPS / self._flop[kind]
        source = f"{REFERENCE_FLOPS / 1e9:g} GFLOP/s, of two cores, for convolutions and matrix products alone"
        self._used.setdefault(source, {})[kind] = f"{rate:,.0f} {of}/s"
        return Time(examples / rate, least=True)

    def __str__(self) -> str:
        """What the times so far are based on."""
        parts = [
            f"at {source}: " + ", ".join(f"{rate} ({', '.join(kind)})".strip() for kind, rate in sorted(kinds.items()))
            for source, kinds in self._used.items()
        ]
        return "; ".join(["one run after the other", *parts])


def plan_lines(cells: Sequence[Cell], pace: Pace) -> Iterator[str]:
    """A line on the cost of each of `cells` (resolved), and one on all that are not finished yet."""
    total, most = Time(0.0), max((len(cell.config.name) for cell in cells), default=0)
    for cell in cells:
        _, mode, config = cell
        run, state = cost(config, mode), _state(cell)
        time = pace.time(config, run.images)
        total = total + time if state != "finished" else total
        parts = [f"{run.local_steps:,} local steps", f"{run.images:,.0f} {examples_of(config)}"]
        if mode == "localsgd":
            whole, peak = traffic(config)
            sent = [f"{whole.up / 1e6:,.1f} MB up", f"{whole.down / 1e6:,.1f} MB down"]
            of_round = f"in a round at most {peak.up / 1e6:,.3f} MB up, {peak.down / 1e6:,.3f} MB down"
            about = "about " * local_steps_schedule(config).decides  # while it trains
            rounds = f"{about}{run.syncs:,} round{'s' * (run.syncs != 1)}"
            parts = [rounds, *parts, *sent, *([of_round] if run.syncs > 1 else []), *_between_clients(config)]
        yield f"{config.name:{most}}  {state}: {', '.join(parts)}, {time}"
    yield f"{len(cells)} run{'s' * (len(cells) > 1)}; those not finished take {total} ({pace})"


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


def list_studies(seeds: Sequence[int], pace: Pace) -> Iterator[str]:
    """Lines on the studies that come with fedsim, by the question that they answer, and their costs."""
    by_question: dict[str, list[Study]] = {}
    for study in map(read_study, study_names()):
        by_question.setdefault(study.question, []).append(study)
    for question, studies in by_question.items():
        yield question or "Others"
        yield from (line for study in studies for line in _study_lines(study, seeds, pace))
        yield ""
    yield f"Times: {pace}."


def _study_lines(study: Study, seeds: Sequence[int], pace: Pace) -> Iterator[str]:
    """The title of a study, and a line on its cost."""
    images, steps, syncs, time, what = 0.0, 0, 0, Time(0.0), ""
    for _, mode, config in (cells := study.cells(seeds)):
        run = cost(config, mode)
        images, steps, syncs = images + run.images, steps + run.local_steps, syncs + run.syncs
        time, what = time + pace.time(config, run.images), examples_of(config)
    yield f"{study.name}: {study.title}"
    yield (
        f"    {len(cells)} runs (seed {', '.join(map(str, seeds or study.seeds))}): {images:,.0f} {what}, "
        f"{steps:,} local steps, {syncs:,} syncs, {time.rounded}"
    )
