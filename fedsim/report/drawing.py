"""What the figures share: a plot with its numbers, panels, line styles, logarithmic axes and legends.

All text has one size. Colours are those of Okabe and Ito 2008, or of viridis for an ordered series; every line has a
marker too.
"""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from fedsim.report.load import escaped

DPI = 144
COLORS = (  # Okabe and Ito 2008, for colour-blind eyes; then five more
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#000000", "#8C564B", "#7F7F7F", "#BCBD22", "#6A3D9A"),
)
MARKERS = "osD^vP*X<>"
LINES = ("-", "--", "-.", ":")
ACROSS = 3  # panels side by side
WIDTHS = {1: 6.4, 2: 8.0, 3: 9.6}  # inches, by the panels side by side
PHONE = 3.8  # inches, the width of a figure with its panels below each other
THUMBNAIL = (1.8, 1.2)  # inches
CHARACTER = 0.085  # inches, the approximate width of a character
SAMPLE = 0.6  # inches, of a line or marker in a legend
MOST_IN_LEGEND, FEW_IN_LEGEND = 24, 8


@dataclass(frozen=True)
class Plot:
    """A figure, its caption, and its numbers. `draw(across)` draws it with at most `across` panels side by side."""

    name: str
    caption: str
    draw: Callable[[int], Figure]
    numbers: pd.DataFrame

    @functools.cached_property
    def figure(self) -> Figure:
        """The figure in the width of a page."""
        return self.draw(ACROSS)

    def image(self, kind: str, command: str, phone: bool = False) -> bytes:
        """The figure as ``png`` or ``svg``, with the `command` that makes it as its description."""
        return self._saved(self.draw(1) if phone else self.figure, kind, command)

    def thumbnail(self, command: str) -> bytes:
        """The first panel of the figure as a small ``svg``, without text."""
        figure = self.draw(1)
        figure.set(layout_engine="none", size_inches=THUMBNAIL)
        for part in [*figure.legends, *figure.axes[1:], *(text for panel in figure.axes for text in panel.texts)]:
            part.remove()
        figure.axes[0].set(title="", xlabel="", ylabel="", position=(0.02, 0.03, 0.96, 0.94))
        figure.axes[0].tick_params(which="both", left=False, bottom=False, labelleft=False, labelbottom=False)
        return self._saved(figure, "svg", command)

    def _saved(self, figure: Figure, kind: str, command: str) -> bytes:
        for text in figure.findobj(Text):
            text.set_parse_math(False)  # names may contain a $
        metadata = {"Description": escaped(command), **({"Date": None} if kind == "svg" else {})}
        file = io.BytesIO()
        with rc_context({"svg.hashsalt": self.name, "svg.fonttype": "none"}):  # the same bytes, and text as text
            figure.savefig(file, format=kind, dpi=DPI, metadata=metadata)
        figure.set_layout_engine("none")  # it stays as it is laid out
        return file.getvalue()


def panels_of(count: int, across: int, width: float = 0.0, sharey: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, at most `across` side by side, and at least `width` inches wide."""
    columns = max(min(count, across), 1)
    down = max(-(-count // columns), 1)
    room = max(WIDTHS[columns], width) if across > 1 else PHONE
    figure = Figure(figsize=(room, (3.4 if across > 1 else 2.9) * down), layout="constrained")
    panels = list(figure.subplots(down, columns, sharey=sharey, squeeze=False).flatten())
    for panel in panels[count:]:
        panel.remove()
    for panel in panels[:count]:
        panel.grid(alpha=0.3)
    return figure, panels[:count]


def label_left(panels: Sequence[Axes], text: str) -> None:
    """Label the y-axes at the left."""
    for panel in panels:
        if panel.get_subplotspec().is_first_col():  # type: ignore[union-attr]
            panel.set_ylabel(text)


def series_style(number: int) -> dict[str, Any]:
    """The colour, the marker and the line of one of several series without an order."""
    line = LINES[number // len(COLORS) % len(LINES)]
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "ls": line}


def has_order(cells: pd.DataFrame) -> bool:
    """Whether the rows of a table are numbers, such as J."""
    return bool(pd.to_numeric(cells["tick"][~cells["baseline"]], errors="coerce").notna().all())


def row_styles(cells: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """A colour, from dark to light if rows have an order, and a marker for each row; baselines are black, dashed."""
    baselines = set(cells["row"][cells["baseline"]])
    rows = [row for row in cells["row"].unique() if row not in baselines]
    styles: dict[str, dict[str, Any]] = {row: {"color": "black", "ls": "--", "marker": "x"} for row in baselines}
    for number, row in enumerate(rows):
        styles[row] = series_style(number)
        if has_order(cells):
            styles[row]["color"] = colormaps["viridis"](0.8 * number / max(len(rows) - 1, 1))
    return styles


def cell_styles(cells: pd.DataFrame) -> dict[int, dict[str, Any]]:
    """The style of each cell: colour and marker by its row, line style by its column."""
    rows, columns = row_styles(cells), list(cells["column"].unique())
    return {
        cell: {**rows[line["row"]], "ls": LINES[columns.index(line["column"]) % len(LINES)]}
        for cell, line in cells[["row", "column"]].to_dict("index").items()
    }


def draw_cells(cells: pd.DataFrame, points: pd.DataFrame, titles: Mapping[str, str], x: str, across: int) -> Figure:
    """A panel for each column of `points` that `titles` names, against the column `x`, with a line for each cell."""
    cells = cells.loc[sorted(points["cell"].unique())]
    figure, panels = panels_of(len(titles), across, sharey=False)
    styles = cell_styles(cells)
    for (name, title), panel in zip(titles.items(), panels, strict=True):
        panel.set_title(title, fontsize="medium")
        panel.set_xlabel(x)
        for cell, curve in points.dropna(subset=[name]).groupby("cell"):
            label = cells["label"][cell] or "all runs"
            every = max(len(curve) // 8, 1)
            panel.plot(curve[x], curve[name], label=label, lw=1.3, ms=4, markevery=every, **styles[cell])
    legend(figure, panels, list(cells["label"]))
    return figure


def log_scale(panel: Axes, which: str, unit: str = "") -> None:
    """Make the ``x`` or ``y`` axis logarithmic, in k, M and G from 1000, with more ticks on a short range."""
    panel.set(**{f"{which}scale": "log"})
    axis = getattr(panel, f"{which}axis")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
    shown = EngFormatter(unit, sep=" " if unit else "")
    axis.set_major_formatter(FuncFormatter(lambda value, _: shown(value) if value >= 1 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, panels: Sequence[Axes], order: Sequence[str] = ()) -> None:
    """One legend for all panels, below them; its labels in the `order` given, then as they are met."""
    found: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    found = {label: found[label] for label in [*order, *found] if label in found}
    if 0 < len(found) <= MOST_IN_LEGEND:  # more would cover the figure; its CSV has the names
        room = figure.get_figwidth()
        widest = room / 2 if room > PHONE and len(found) > FEW_IN_LEGEND else room
        labels = [textwrap.fill(label, int((widest - SAMPLE) / CHARACTER), break_on_hyphens=False) for label in found]
        widths = [SAMPLE + CHARACTER * max(map(len, label.splitlines())) for label in labels]
        across = len(found) if sum(widths) < room else max(1, int(room / max(widths)))
        down = -(-len(found) // across)
        lines = [label.count("\n") + 1 for label in labels]
        longest = max(sum(lines[start : start + down]) for start in range(0, len(lines), down))
        figure.set_figheight(figure.get_figheight() + 0.22 * longest)
        figure.legend(list(found.values()), labels, loc="outside lower center", ncols=across, frameon=False)
