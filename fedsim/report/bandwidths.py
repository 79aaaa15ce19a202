"""The figure of ``run.py time-to-accuracy``: the time to the target at every bandwidth, and the fastest cells."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fedsim.network import Network
from fedsim.report.drawing import CHARACTER, Plot, cell_styles, legend, log_scale, panels_of
from fedsim.report.result_table import ResultTable

BANDWIDTHS = np.logspace(6, 11, 101)  # bits per second
UNITS = ((1e9, "Gbit/s"), (1e6, "Mbit/s"))


def seconds_by_bandwidth(times: pd.DataFrame, network: Network) -> pd.DataFrame:
    """The seconds of each cell whose runs all reach the target (columns), at each of `BANDWIDTHS` (the index).

    Where messages are on their way while workers compute (`late`), the longer of the two counts; all rounds are equal.
    """
    whole = times[(times["reached"] > 0) & (times["reached"] == times["runs"])]
    slower = 8 * network.bandwidth / BANDWIDTHS[:, None]
    computing, waiting, transfer = (whole[part].to_numpy(float) for part in ("computing", "waiting", "transfer"))
    longer = np.maximum(computing, waiting + slower * transfer)
    seconds = np.where(whole["late"], longer, computing + waiting + slower * transfer)
    return pd.DataFrame(seconds, index=BANDWIDTHS, columns=whole.index)


def fastest_cells(seconds: pd.DataFrame) -> list[tuple[int, float, float]]:
    """(cell, lowest, highest) for each range of bandwidths in which one cell is the fastest."""
    if seconds.empty:
        return []
    best = seconds.idxmin(axis="columns")
    begin = best[best != best.shift()]
    ends = [*begin.index[1:], best.index[-1]]
    return [(int(cell), float(low), float(high)) for (low, cell), high in zip(begin.items(), ends, strict=True)]


def plot_bandwidths(times: pd.DataFrame, table: ResultTable, target: float, network: Network) -> Plot:
    """The time to the target against the bandwidth, a line for each cell, with the fastest cells named above.

    `times`: of `times_to_target`.
    """
    seconds = seconds_by_bandwidth(times, network)
    names = times["label"].replace("", table.name)
    ranges = fastest_cells(seconds)

    def draw(across: int) -> Figure:
        figure, (panel,) = panels_of(1, across, width=6.6)
        styles = cell_styles(times)
        inches = 0.8 * figure.get_figwidth() / np.log10(BANDWIDTHS[-1] / BANDWIDTHS[0])  # of a decade, about
        for cell in seconds:
            panel.plot(seconds.index, seconds[cell], label=names[cell], markevery=10, lw=1.3, ms=4, **styles[cell])
        for cell, low, high in ranges:
            panel.axvspan(low, high, 0.98, 1, color=styles[cell]["color"], lw=0)
            name = names[cell].replace(", ", "\n")
            if np.log10(high / low) * inches > CHARACTER * max(map(len, name.split("\n"))):
                middle, top = np.sqrt(low * high), panel.get_xaxis_transform()
                panel.annotate(name, (middle, 1), (0, 3), top, "offset points", ha="center", va="bottom")
        panel.set_xlim(BANDWIDTHS[0], BANDWIDTHS[-1])
        log_scale(panel, "x", "bit/s")
        if ranges:
            log_scale(panel, "y")
        upload = (network.upload or network.bandwidth) / network.bandwidth
        panel.set_xlabel("bandwidth of a link" + (f" down; {upload:.3g} of it up" if upload != 1 else ""))
        panel.set_ylabel(f"seconds to {table.metric.goal(target)}")
        legend(figure, [panel])
        return figure

    caption = f"Time to {goal_of(table, target)}. {_fastest(ranges, names)}"
    if left_out := [str(names[cell]) for cell in times.index.difference(seconds.columns)]:
        caption += f" Not reached by every run of: {'; '.join(left_out)}."
    numbers = seconds.rename_axis("bits_per_second").reset_index().melt("bits_per_second", var_name="cell")
    fastest = numbers.groupby("bits_per_second")["value"].transform("min") == numbers["value"]
    numbers = numbers.assign(fastest=fastest, cell=numbers["cell"].map(names)).rename(columns={"value": "seconds"})
    return Plot(f"bandwidth-{table.name}", caption, draw, numbers)


def goal_of(table: ResultTable, target: float) -> str:
    """The target, and what it is measured on, in words."""
    metric = table.metric
    goal = f"{metric.goal(target)} {metric.words}" if metric.unit == "%" else metric.goal(target)
    return f"{goal} on {table.tested_on} {metric.examples}"


def _fastest(ranges: list[tuple[int, float, float]], names: pd.Series) -> str:
    """The fastest cells, from the lowest bandwidth to the highest, as a sentence."""
    if not ranges:
        return "No cell reaches it in every run."
    *parts, last = [(names[cell], _bandwidth(high)) for cell, _, high in ranges]
    shown = [f"{name} to {high}" for name, high in parts] + [f"{last[0]} {'above' if parts else 'everywhere'}"]
    return f"Fastest, named above: {'; '.join(shown)}."


def _bandwidth(bits: float) -> str:
    unit, name = next((unit, name) for unit, name in UNITS if bits >= unit)
    return f"{bits / unit:.3g} {name}"
