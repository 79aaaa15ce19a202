"""Who holds which training images: a table and a figure of a partition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Column, Table

from fedsim.config import Config
from fedsim.data.datasets import load_dataset
from fedsim.data.partition import check_partition, class_counts, examples_of
from fedsim.errors import UserError
from strategies.arguments import split_name

FORMATS = (".png", ".pdf", ".svg")


def show_partition(config: Config, out: str, console: Console) -> None:
    """Print the table of the partition of `config` (resolved) and, if `out` is given, draw it to that file."""
    if out and Path(out).suffix not in FORMATS:
        raise UserError(f"out = {out} is not a name of a figure: it must end with one of {', '.join(FORMATS)}")
    check_partition(config)
    counts = class_counts(config)
    console.print(table(counts))
    held, images = int(counts.sum()), len(load_dataset(config).train)
    name, _ = split_name(config.partition)
    console.print(f"{name}: {config.clients} clients hold {held:,} of {images:,} training {examples_of(config)}")
    if out:
        figure(counts).savefig(out, dpi=150)
        console.print(f"drawn in {out}")


def table(counts: NDArray[np.int64]) -> Table:
    """A row for each client: its images, its classes, and the share of its most frequent class."""
    names = ("client", "images", "classes", "largest class")
    rows = Table(*(Column(name, justify="right") for name in names), box=None)
    for client, of_client in enumerate(counts):
        share = of_client.max() / of_client.sum()
        rows.add_row(f"{client}", f"{of_client.sum():,}", f"{np.count_nonzero(of_client)}", f"{share:.0%}")
    return rows


def figure(counts: NDArray[np.int64]) -> Figure:
    """A heat map of `class_counts` beside the sizes of the shards."""
    clients, classes = counts.shape
    drawn = Figure(figsize=(min(12, 3 + classes * 0.12), min(10, 2 + clients * 0.15)), layout="constrained")
    left, right = drawn.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    shades = left.imshow(counts, aspect="auto", interpolation="nearest", cmap="viridis")
    left.set(xlabel="class", ylabel="client")
    drawn.colorbar(shades, ax=left, label="images")
    right.barh(range(clients), counts.sum(1))
    right.set(xlabel="images")
    return drawn
