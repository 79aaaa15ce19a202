"""The tables that ``run.py bench`` prints. All fit a terminal of 80 characters."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from fedsim.bench.turn import Timing
from fedsim.bench.variants import VARIANTS
from fedsim.experiments.cost import flop_per_image


def rounds_table(timings: Sequence[Timing]) -> Group:
    """The timings, compared with other variants at the same K."""
    speed = {(each.variant, each.config.clients): each.images_per_second for each in timings}
    rows = []
    for each in timings:
        k, seconds = each.config.clients, statistics.median(each.seconds)
        relative = {
            name: f"{each.images_per_second / speed[name, k]:.2f}" if (name, k) in speed else ""
            for name in ("centralized", "in-process")
        }
        rows.append(
            {
                "K": f"{k}",
                "variant": each.variant,
                "s a\nround": f"{seconds:.3f}",
                "spread": f"{(max(each.seconds) - min(each.seconds)) / seconds:.0%}",
                "images/s": f"{each.images_per_second:,.0f}",
                "of cen-\ntralized": relative["centralized"],
                "of in-\nprocess": relative["in-process"],
                "peak\nMiB": f"{each.peak_bytes / 2**20:,.0f}",
            }
        )
    of_gpu = any(each.config.device.startswith("cuda") for each in timings)
    legend = {
        "spread": "the longest round less the shortest, of the median",
        **{
            f"of {name}": f"images/s, over those of {name} at the same K"
            for name in ("centralized", "in-process")
            if any((name, each.config.clients) in speed for each in timings)
        },
        "peak MiB": "allocated on the GPU" if of_gpu else "resident memory, the sum of all processes",
        **{each.variant: VARIANTS[each.variant][1] for each in timings},
    }
    lines = "\n".join(f"{name}: {meaning}" for name, meaning in legend.items())
    return Group(plain_table("A round of LocalSGD: medians", rows), lines)


def large_table(timings: Sequence[Timing]) -> Table:
    """Centralized training by batch size."""
    flop = flop_per_image(timings[0].config)
    rows = [
        {
            "precision": each.config.precision,
            "batch": f"{each.config.batch_size}",
            "ms a step": f"{1000 * statistics.median(each.seconds) / each.config.local_steps:.2f}",
            "images/s": f"{each.images_per_second:,.0f}",
            "TFLOP/s": f"{each.images_per_second * flop / 1e12:,.2f}",
        }
        for each in timings
    ]
    return plain_table("Centralized training, J steps a round", rows)


def growth_table(timings: Sequence[Timing]) -> Table:
    """The seconds of a round as K and J grow."""
    rows = []
    for each in timings:
        k, j, seconds = each.config.clients, each.config.local_steps, statistics.median(each.seconds)
        step = f"{1000 * seconds / (k * j):.2f}"
        peak = f"{each.peak_bytes / 2**20:,.0f}"
        rows.append(
            {"K": f"{k}", "J": f"{j}", "s a round": f"{seconds:.3f}", "ms a local step": step, "peak MiB": peak}
        )
    return plain_table("Rounds of lenet5 at batch 32", rows)


def plain_table(title: str, rows: Sequence[Mapping[str, str]]) -> Table:
    """A table of `rows`, each with the same columns; empty columns are left out."""
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    result = Table(title=title, box=SIMPLE_HEAD, show_edge=False, padding=0)
    for name in columns:
        result.add_column(name, justify="left" if name == "variant" else "right", no_wrap=name == "variant")
    for row in rows:
        result.add_row(*(row[name] for name in columns))
    return result
