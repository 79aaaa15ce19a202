"""Configuration keys as flags of the command line, and its help, which groups them into sections."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import click
import typer
from typer.core import TyperCommand, TyperGroup

from fedsim.config import FIELDS, Mode, has_key, typed
from fedsim.config.messages import about, suggestions
from fedsim.errors import UserError
from fedsim.system.torch_import import import_torch
from strategies.arguments import kebab

MOST_USED = "dataset model optimizer lr batch-size epochs clients local-steps seed device results-dir name".split()
FIRST = "Keys used most"
PANELS = {  # the first key of each, in the order of config.py -> the title of its section of the help
    "dataset": "Data",
    "model": "Model and optimizer",
    "schedule": "Schedule and budget",
    "clients": "LocalSGD",
    "seed": "The run",
}
ALL = tuple(map(kebab, FIELDS))
SWITCHES = {kebab(name) for name, field in FIELDS.items() if field.annotation is bool}
KINDS: dict[Any, str | None] = {int: "INTEGER", float: "NUMBER", str: "TEXT"}


class CommandGroup(TyperGroup):
    """All commands; the help shows the first paragraph of each, not truncated."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        first = {name: (command.help or "").split("\n\n")[0] for name, command in self.commands.items()}
        with formatter.section("Commands"):
            formatter.write_dl([(name, " ".join(text.split())) for name, text in first.items()])


class Command(TyperCommand):
    """A command whose help has a section for each ``rich_help_panel`` of its options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                flags, meaning = record[0], record[1].replace(r"\[", "[")  # typer escapes brackets for rich
                title = getattr(parameter, "rich_help_panel", None) or "Options"
                sections.setdefault(title, []).append((flags, meaning))
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


class TorchCommand(Command):
    """A command that needs torch, which is imported before it is invoked."""

    def invoke(self, ctx: click.Context) -> Any:
        import_torch()
        return super().invoke(ctx)


class RayCommand(TorchCommand):
    """A command with --ray, whose ADDRESS may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--ray" in args:
            after = args.index("--ray") + 1
            if after == len(args) or not re.fullmatch("auto|local|[^-].*:.*", args[after]):
                args = [*args[:after], "", *args[after:]]
        return super().parse_args(ctx, args)


class GridCommand(RayCommand):
    """A grid. Its switches take a list, as in --error-feedback true,false, or no value: --error-feedback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given: list[str] = []
        for word, after in itertools.zip_longest(args, args[1:], fillvalue="-"):
            if word.startswith("--no-") and word[5:] in SWITCHES:
                given += [f"--{word[5:]}", "false"]
            else:
                given += [word, "true"] if word[2:] in SWITCHES and after.startswith("-") else [word]
        return super().parse_args(ctx, given)


def keys_of(
    mode: Mode, without: Sequence[str] = (), only: Sequence[str] = ALL, lists: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: replace the parameter ``**keys`` of a command by a flag for each key of `mode`; see `given`.

    Keys in `without`, and those not in `only`, get no flag. `lists` (for a `GridCommand`): boolean keys accept lists.
    """

    def with_flags(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True).parameters.values()
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature if p.kind is not p.VAR_KEYWORD]
        first, others, panel = list[inspect.Parameter](), list[inspect.Parameter](), ""
        for name in FIELDS:
            panel = PANELS.get(name, panel)
            if not has_key(mode, name) or kebab(name) in without or kebab(name) not in only:
                continue
            if kebab(name) in MOST_USED:
                first.append(_flag(name, FIRST, lists))
            else:
                others.append(_flag(name, panel, lists))
        parameters = first + own + others
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return with_flags


def given(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that the user gave, by their keys in kebab-case."""
    return {kebab(name): value for name, value in keys.items() if value is not None}


def _flag(name: str, panel: str, lists: bool) -> inspect.Parameter:
    """The option of a key. Its value is None if it is not given, otherwise text that `Config` parses and checks."""
    field, key = FIELDS[name], kebab(name)
    switch = field.annotation is bool
    flags, metavar = [f"--{key}"], KINDS.get(field.annotation, "NAME")
    if switch:
        flags, metavar = ([f"--no-{key}", f"--{key}"], "[LIST]") if lists else ([f"--{key}/--no-{key}"], None)
    default = "empty" if field.default == "" else str(field.default).lower() if switch else field.default
    option = typer.Option(
        None,
        *flags,
        help=f"{about(field)} (default: {default})",
        metavar=metavar,
        show_default=False,
        rich_help_panel=panel,
        autocompletion=_completion(suggestions(field)),
    )
    annotation: Any = Optional[bool if switch and not lists else str]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)


def _completion(names: Sequence[str]) -> Callable[[str], list[str]]:
    """Shell completion of a value: those of `names` that start with the text typed so far."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def integers(name: str, listed: str) -> list[int]:
    """The whole numbers in a text with commas, sorted, without duplicates."""
    try:
        return sorted({int(part) for part in listed.split(",")})
    except ValueError:
        raise UserError(f"{name} = {listed!r} is not a list of whole numbers: for instance --{name} 4,12") from None


def several(name: str, value: Any) -> list[Any]:
    """The values of the key `name` in a text with commas; empty if there is only one.

    ``argument=value`` after a comma belongs to the choice before it: ``none,slowmo:lr=1,momentum=0.6`` are two.
    """
    parts: list[str] = []
    for part in value.split(",") if isinstance(value, str) else []:
        if parts and "=" in part and ":" not in part.partition("=")[0]:
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return [typed(name, part.strip()) for part in parts] if len(parts) > 1 else []
