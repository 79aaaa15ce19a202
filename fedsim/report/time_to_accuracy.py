"""``run.py plan``: the time to a target accuracy of each cell on a given network, from the records alone."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsim.errors import UserError
from fedsim.report.figures import Plot, by_place, save_plot
from fedsim.report.load import CellResults, Group, Result, read_groups
from fedsim.report.network import Network, seconds_of, traffic
from fedsim.report.words import label, percent

HEADER = (
    "cell", "workers", "compute_s", "runs", "reached", "seconds_mean", "seconds_std", "epoch_mean", "syncs_mean",
    "bytes_mean", "best_accuracy",
)  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """One cell's way to the target; a list has an entry for each run that reached it."""

    cell: CellResults
    compute: float
    seconds: list[float]
    epochs: list[float]
    syncs: list[float]
    bytes: list[float]


def plan_results(
    root: Path, target: float, network: Network, compute: float | None, out: Path, command: str, console: Console
) -> None:
    """Plan every group under `root`: a table here, ``plan-NAME.csv`` and ``plan-NAME.png`` in `out`."""
    if not 0 < target < 1:
        raise UserError(f"target = {target} is no accuracy: give a fraction between 0 and 1, for instance 0.5")
    groups, warnings = read_groups(root)
    for warning in warnings:
        console.print(f"warning: {warning}", soft_wrap=True, highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    for group in groups:
        planned = plan_group(group, target, network, compute)
        name = f"plan-{group.name}"
        save_plot(plot_plan(planned, group, target, name), out, command)
        console.print(plan_table(planned, group, target))
        console.print(f"{out / name}.csv\n{out / name}.png", soft_wrap=True, highlight=False)


def plan_group(group: Group, target: float, network: Network, compute: float | None) -> list[Planned]:
    """Each cell that has a test; `compute` is a worker's seconds a step, or None for what the records show.

    Measured: the median over the group's runs of seconds / images computed (testing included), times the images
    of one worker's step: each worker is taken to be as fast as the whole machine that made the records.
    """
    pace = None if compute is not None else seconds_an_image(group)
    planned = []
    for cell in group.cells:
        if not any(run.tested for run in cell.runs):
            continue
        step = compute if compute is not None else (pace or 0.0) * _images_a_step(cell)
        ways = [way for run in cell.runs if (way := _way(cell, run, target, network, step)) is not None]
        seconds, epochs, syncs, sent = (list(part) for part in zip(*ways, strict=True)) if ways else ([], [], [], [])
        planned.append(Planned(cell, step, seconds, epochs, syncs, sent))
    return planned


def seconds_an_image(group: Group) -> float:
    """The median over the runs of a group of seconds for each training image computed, testing included."""
    paces = [
        run.rows[-1]["seconds"] / (run.rows[-1]["local_steps"] * cell.workers * _images_a_step(cell))
        for cell in group.cells
        for run in cell.runs
        if run.rows and "seconds" in run.rows[-1]
    ]
    if not paces:
        raise UserError(f"{group.folder} has no row that tells its seconds: give --compute, for instance 10ms")
    return float(statistics.median(paces))


def _images_a_step(cell: CellResults) -> float:
    """A worker's images a step; of a twin, its share of the large batch."""
    batch = int(cell.config["batch-size"])
    return batch if cell.config["mode"] == "localsgd" else batch / cell.workers


def _way(
    cell: CellResults, run: Result, target: float, network: Network, compute: float
) -> tuple[float, float, float, float] | None:
    """Seconds, epochs, syncs and bytes until the first test at or above `target`; None where there is none."""
    row = next((row for row in run.tested if row["test_accuracy"] >= target), None)
    sent = traffic(cell, run, row) if row else None
    if row is None or sent is None:
        return None
    seconds = seconds_of(row["local_steps"], sent, cell.workers, compute, network)
    return seconds, row["epoch"], sent.syncs, sent.bytes_up + sent.bytes_down


def best_accuracy(cell: CellResults) -> float:
    """The best test of any run of the cell so far."""
    return max(float(row["test_accuracy"]) for run in cell.runs for row in run.tested)


def plan_table(planned: Sequence[Planned], group: Group, target: float) -> Table:
    """The plan for the terminal, the fastest cell first."""
    title = f"{group.title}: time to {100 * target:g} % accuracy"
    table = Table(
        title=title, caption=f"mean ± standard deviation of the runs that reached it, on {group.tested_on} images"
    )
    for name in ("cell", "time", "epochs", "syncs", "MB sent", "runs"):
        table.add_column(name, justify="left" if name == "cell" else "right")
    for plan in sorted(planned, key=lambda p: statistics.fmean(p.seconds) if p.seconds else float("inf")):
        reached = f"{len(plan.seconds)} of {len(plan.cell.runs)}"
        if not plan.seconds:
            best = percent([best_accuracy(plan.cell)])
            never = "never" if all(run.finished for run in plan.cell.runs) else "not yet"
            table.add_row(
                label(group.axes, plan.cell.place) or group.name, f"{never} (best {best} %)", "–", "–", "–", reached
            )
            continue
        spread = f" ± {statistics.stdev(plan.seconds):.3g}" if len(plan.seconds) > 1 else ""
        means = [statistics.fmean(values) for values in (plan.epochs, plan.syncs, plan.bytes)]
        table.add_row(
            label(group.axes, plan.cell.place) or group.name,
            f"{statistics.fmean(plan.seconds):,.1f}{spread} s",
            f"{means[0]:.2f}",
            f"{means[1]:,.0f}",
            f"{means[2] / 1e6:,.1f}",
            reached,
        )
    return table


def plan_rows(planned: Sequence[Planned], group: Group) -> list[list[Any]]:
    """A line of `HEADER` for each cell; empty where no run reached the target."""
    rows = []
    for plan in planned:
        means = [statistics.fmean(v) if v else "" for v in (plan.seconds, plan.epochs, plan.syncs, plan.bytes)]
        spread = statistics.stdev(plan.seconds) if len(plan.seconds) > 1 else ""
        head = [label(group.axes, plan.cell.place) or group.name, plan.cell.workers, plan.compute, len(plan.cell.runs)]
        rows.append([*head, len(plan.seconds), means[0], spread, *means[1:], best_accuracy(plan.cell)])
    return rows


def plot_plan(planned: Sequence[Planned], group: Group, target: float, name: str) -> Plot:
    """Time to the target by place in the table; cells that never reach it are counted below."""
    seconds = {plan.cell.place: plan.seconds for plan in planned if plan.seconds}
    never = len(planned) - len(seconds)
    caption = f"Time to {100 * target:g} % accuracy" + (
        f"; {never} of {len(planned)} cells do not reach it" * (never > 0)
    )
    plot = by_place(group, seconds, name, caption, "seconds to the target", log=True)
    return dataclasses.replace(plot, header=HEADER, rows=plan_rows(planned, group))
