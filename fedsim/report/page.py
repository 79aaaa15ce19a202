"""``run.py report``: all results under a folder as an HTML page, Markdown, figures and CSV files."""

from __future__ import annotations

import base64
import contextlib
import errno
import re
import shlex
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, select_autoescape
from rich.console import Console
from rich.progress import track

from fedsim.errors import RunFailed, UserError
from fedsim.report.answers import answers, note_of
from fedsim.report.differences import paired_differences
from fedsim.report.drawing import Plot
from fedsim.report.figures import plots_of
from fedsim.report.load import escaped
from fedsim.report.result_table import ResultTable, read_tables
from fedsim.report.tables import TRAFFIC, csv_text, notes, origins, progress, result_table, runs_frame, show_table
from fedsim.system.provenance import program

TITLE = "fedsim: results of the runs"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
PIXELS_PER_INCH = 96  # of CSS, so that text in figures is as large as that of the page


def build_report(root: str, out: str, figure: str, console: Console) -> None:
    """Write the report on all results under `root` to `out`; with `figure`, only that figure and its CSV."""
    tables, warnings = read_tables(folder("results", root))
    show_warnings(warnings, console)
    command = f"{program()} {shlex.join(['report', root, '-o', out])}"
    makers = {name: make for table in tables for name, make in plots_of(table).items()}
    if figure and figure not in makers:
        raise UserError(f"figure = {figure!r} cannot be made of {root}: it must be one of {', '.join(makers)}")
    with output_folder(out) as path:
        if figure:
            save_plot(makers[figure](), path, f"{command} --figure {figure}")
            show_path(path / f"{figure}.png", console)
            return
        shown = track(tables, "report", console=console, transient=True, disable=not console.is_terminal)
        sections = [_section(table, path, command) for table in shown]
        content = {"title": TITLE, "sections": sections, "warnings": warnings, "command": escaped(command)}
        templates = _templates()
        for template, name in (("page.html.j2", "index.html"), ("report.md.j2", "report.md")):
            (path / name).write_text(templates.get_template(template).render(content), encoding="utf-8")
            show_path(path / name, console)


def show_results(root: Path, console: Console, save_as: str = "") -> None:
    """Print the final accuracies under `root`; with `save_as`, also write the first table to `save_as`.csv and .png."""
    tables, warnings = read_tables(root)
    show_warnings(warnings, console)
    for table in tables:
        console.print(table.question or table.title, markup=False, highlight=False)
        changes = paired_differences(table)
        show_table(result_table(table, changes, TRAFFIC), console)
        console.print(answers(table, changes)[0], markup=False, highlight=False)
    if save_as:
        with output_folder(str(root)) as path:
            write_csv(runs_frame(tables[0]), path / f"{save_as}.csv")
            show_path(path / f"{save_as}.csv", console)
            for make in list(plots_of(tables[0]).values())[:1]:
                (path / f"{save_as}.png").write_bytes(make().image("png", f"{program()} grid"))
                show_path(path / f"{save_as}.png", console)


def folder(key: str, text: str) -> Path:
    """The folder `text`, given as the argument `key`; ``~`` is expanded."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key} = {escaped(text)}: there is no such home folder: give another folder") from error


@contextlib.contextmanager
def output_folder(text: str) -> Iterator[Path]:
    """Create the folder to write to. An OSError within becomes RunFailed if the disk is full, else UserError."""
    path = folder("out", text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield path
    except OSError as error:
        if error.errno in DISK_ERRORS:
            reason = f"{escaped(path)} cannot be written ({error.strerror})"
            raise RunFailed(f"{reason}: free some space and try again") from error
        raise UserError(f"out = {escaped(text)} cannot be written ({error.strerror}): give another -o") from error


def save_plot(plot: Plot, path: Path, command: str) -> tuple[Path, ...]:
    """Write ``NAME.png``, ``NAME.svg`` and ``NAME.csv`` to the folder `path`; returns their paths."""
    png, svg, csv = (path / f"{plot.name}.{kind}" for kind in ("png", "svg", "csv"))
    png.write_bytes(plot.image("png", command))
    svg.write_bytes(plot.image("svg", command))
    write_csv(plot.numbers, csv)
    return png, svg, csv


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a table of numbers as CSV."""
    path.write_text(csv_text(frame), encoding="utf-8")


def show_warnings(warnings: Sequence[str], console: Console) -> None:
    """Print each warning on one line."""
    for warning in warnings:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True, highlight=False)


def show_path(path: Path, console: Console) -> None:
    """Print a path on one line."""
    console.print(escaped(path), markup=False, soft_wrap=True, highlight=False)


def _section(table: ResultTable, path: Path, command: str) -> dict[str, Any]:
    """The part of the page about one table; its figures and CSV files are written to `path`."""
    plots = [make() for make in plots_of(table).values()]
    write_csv(runs_frame(table), path / f"{table.name}-runs.csv")
    changes = paired_differences(table)
    short, *more = answers(table, changes)
    return {
        "name": table.name,
        "title": table.title,
        "question": escaped(table.question),
        "short": short,
        "answers": more,
        "paired": "" if changes.empty else note_of(table.metric),
        "notes": notes(table),
        "progress": progress(table),
        "table": result_table(table, changes) if table.counted.size else None,
        "figures": [_figure(plot, path, command) for plot in plots],
        "thumbnail": _in_base64(plots[0].thumbnail(command)) if plots else "",
        "command": escaped(f"{command} --figure {plots[0].name}") if plots else "",
        "provenance": [(name, escaped(value)) for name, value in origins(table)],
    }


def _figure(plot: Plot, path: Path, command: str) -> dict[str, Any]:
    """A figure of the page; its files are written to `path`."""
    command = f"{command} --figure {plot.name}"
    _, svg, _ = save_plot(plot, path, command)
    return {
        "name": plot.name,
        "caption": escaped(plot.caption),
        "wide": _in_base64(svg.read_bytes()),
        "narrow": _in_base64(plot.image("svg", command, phone=True)),  # its panels are below each other
        "width": round(PIXELS_PER_INCH * plot.figure.get_figwidth()),
    }


def _in_base64(image: bytes) -> str:
    return base64.b64encode(image).decode()


def _templates() -> Environment:
    loader, escape_html = FileSystemLoader(Path(__file__).parent), select_autoescape(["html.j2"])
    environment = Environment(loader=loader, autoescape=escape_html, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"md": _markdown, "code": _code, "unbroken": _unbroken}
    return environment


def _markdown(text: str) -> str:
    """`text` with Markdown's special characters escaped."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", escape(text, quote=False))


def _unbroken(text: str) -> str:
    """`text` with no line break beside = and ±."""
    return re.sub(" ([=±]) ", "\u00a0\\1\u00a0", text)


def _code(text: str) -> str:
    """`text` as Markdown code, or only escaped if it has characters that cannot be escaped in code."""
    return _markdown(text) if re.search("[`|<>&]", text) else f"`{text}`"
