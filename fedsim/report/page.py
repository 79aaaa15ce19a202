"""The report as one HTML file that needs no other, and as Markdown."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 64rem; margin: 0 auto;
       padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; border-top: 1px solid #ccc; padding-top: 1.5rem; }
.wide { overflow-x: auto; margin: .3rem 0 1rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
.caption { font-size: .9rem; font-weight: 600; margin: 1.5rem 0 0; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th { border-bottom: 2px solid #999; }
td small { display: block; color: #555; }
figure { margin: 1.5rem 0; } img { width: 100%; min-width: 34rem; max-width: 60rem; height: auto; }
figcaption, dl, .command { font-size: .85rem; color: #444; }
dt { font-weight: 600; } dd { margin: 0 0 .3rem 1rem; }
code { font-size: .8rem; background: #f3f3f3; padding: .1rem .25rem; }
.warnings { background: #fff6e0; border-left: 4px solid #e0a800; padding: .5rem 1rem; }
"""
TITLE = "fedsim: what the runs show"


class Grid(NamedTuple):
    """A table: its caption, its header, its rows of text."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Figure(NamedTuple):
    """A picture ``NAME.png`` beside ``NAME.csv``, and the command that remakes both."""

    name: str
    caption: str
    command: str


class Section(NamedTuple):
    """One group of runs."""

    name: str
    title: str
    notes: Sequence[str]
    tables: Sequence[Grid]
    figures: Sequence[Figure]
    provenance: Sequence[tuple[str, str]]


def html_page(sections: Sequence[Section], warnings: Sequence[str], command: str, folder: Path) -> str:
    """The page; the pictures are read from `folder` and go into it."""
    links = "".join(f'<li><a href="#{escape(s.name)}">{escape(s.title)}</a></li>' for s in sections)
    body = "".join(_html_section(section, folder) for section in sections)
    noted = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    told = f'<div class="warnings"><p>{len(warnings)} warnings</p><ul>{noted}</ul></div>' if warnings else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{TITLE}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{TITLE}</h1>\n"
        f'<p class="command">Made from the records alone by <code>{escape(command)}</code></p>\n'
        f"{told}<ul>{links}</ul>\n{body}</body>\n</html>\n"
    )


def _html_section(section: Section, folder: Path) -> str:
    notes = "".join(f"<p>{escape(note)}</p>\n" for note in section.notes)
    tables = "".join(_html_table(grid) for grid in section.tables)
    figures = "".join(_html_figure(figure, folder) for figure in section.figures)
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in section.provenance)
    return (
        f'<section id="{escape(section.name)}">\n<h2>{escape(section.title)}</h2>\n{notes}{tables}{figures}'
        f"<details><summary>Where this comes from</summary><dl>{facts}</dl></details>\n</section>\n"
    )


def _html_table(grid: Grid) -> str:
    header = "".join(f"<th>{escape(name)}</th>" for name in grid.header)
    rows = "".join("<tr>" + "".join(f"<td>{_html_cell(c)}</td>" for c in row) + "</tr>\n" for row in grid.rows)
    caption = f'<p class="caption">{escape(grid.caption)}</p>'
    return f'{caption}<div class="wide"><table><thead><tr>{header}</tr></thead><tbody>\n{rows}</tbody></table></div>\n'


def _html_cell(text: str) -> str:
    """What stands in brackets goes small below the rest."""
    value, bracket, rest = text.partition(" (")
    return f"{escape(value)}<small>{escape(rest.removesuffix(')'))}</small>" if bracket else escape(text)


def _html_figure(figure: Figure, folder: Path) -> str:
    picture = base64.b64encode((folder / f"{figure.name}.png").read_bytes()).decode()
    return (
        f'<figure><div class="wide"><img alt="{escape(figure.caption)}" src="data:image/png;base64,{picture}"></div>'
        f"<figcaption>{escape(figure.caption)}<br>{escape(figure.name)}.png, its numbers in {escape(figure.name)}.csv: "
        f"<code>{escape(figure.command)}</code></figcaption></figure>\n"
    )


def markdown_page(sections: Sequence[Section], warnings: Sequence[str], command: str) -> str:
    """The same in Markdown, with links to the pictures beside it."""
    parts = [f"# {TITLE}", f"Made from the records alone by `{command}`."]
    if warnings:
        parts.append("\n".join([f"**{len(warnings)} warnings**", "", *(f"- {warning}" for warning in warnings)]))
    for section in sections:
        parts += [f"## {section.title}", *section.notes]
        parts += [_markdown_table(grid) for grid in section.tables]
        parts += [f"![{f.caption}]({f.name}.png)\n\n{f.caption} `{f.command}`" for f in section.figures]
        parts.append("\n".join(f"- {name}: {value}" for name, value in section.provenance))
    return "\n\n".join(parts) + "\n"


def _markdown_table(grid: Grid) -> str:
    lines = [grid.header, ["---"] + ["---:"] * (len(grid.header) - 1), *grid.rows]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"**{grid.caption}**\n\n{table}"
