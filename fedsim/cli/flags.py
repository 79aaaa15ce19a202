"""Commands made of their declarations: options and configuration keys as flags, and a help with sections."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any, get_args, get_origin

import click
from pydantic.fields import FieldInfo
from rich.console import Console

from fedsim.cli.completion import completion_of
from fedsim.config import FIELDS, typed
from fedsim.config.messages import about
from fedsim.config.options import LIST, POSITIONAL, Flags, Keys, Options
from fedsim.system.torch_import import import_torch
from strategies.arguments import kebab

MOST_USED = "dataset model optimizer lr batch_size epochs clients local_steps seed device results_dir name".split()
FIRST = "Keys used most"
ARGUMENTS = "Arguments"
OWN = "Options"
RAY = "Several cells at a time, on Ray"
RAY_OPTIONS = ("ray", "cpus_per_cell", "gpus_per_cell")
FEW = "Keys"  # of a command that has only some of them
SHOWN = {ARGUMENTS, FIRST, OWN, FEW}  # by --help; the other sections by --help-all
LONG_LIST = re.compile(r"; one of [^(]{20,}(?= \(default)")  # names in a help, which `fedsim list` has too
ALL = "fedsim.help-all"  # in the context of a command: whether all sections are shown
PANELS = {  # the first key of each, in the order of config.py -> the title of its section of the help
    "dataset": "Data",
    "model": "Model and optimizer",
    "schedule": "Schedule and budget",
    "clients": "LocalSGD",
    "seed": "The run",
}
KINDS: dict[Any, str] = {int: "INTEGER", float: "NUMBER", str: "TEXT"}


class CommandGroup(click.Group):
    """All commands; the help shows the first paragraph of each, not truncated."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        first = {name: (command.help or "").split("\n\n")[0] for name, command in self.commands.items()}
        with formatter.section("Commands"):
            formatter.write_dl([(name, " ".join(text.split())) for name, text in first.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Invoke a command. A closed pipe ends it, with how to resume: click would close standard error too."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            for note in getattr(error, "__notes__", ()):
                print(f"error: standard output was closed by whoever read it: {note}", file=sys.stderr)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left to be flushed
            sys.exit(1)

    def of(self, options: type[Options], name: str = "", torch: bool = True) -> Callable[[Callable[..., None]], None]:
        """Decorator: the command of these `options`, named for its function, which gets them as an object.

        Where the options have keys, it also gets a dict of those that were given, in kebab-case. With `torch`, that is
        imported before.
        """
        flags = options.key_flags()

        def add(function: Callable[..., None]) -> None:
            def callback(**values: Any) -> None:
                if torch:
                    with Console().status("starting"):  # in a terminal, for the seconds that it takes
                        import_torch()
                given = {key: value for key, value in values.items() if value is not None}
                own = options.of({key: given[key] for key in options.model_fields if key in given})
                keys = {kebab(key): given[key] for key in flags if key in given}
                function(own, *([keys] if flags else []))

            command = Command(name or kebab(function.__name__), options, callback, inspect.getdoc(function) or "")
            self.add_command(command)

        return add


class Command(click.Command):
    """The command of `options`; its help has a section for each part of them."""

    def __init__(self, name: str, options: type[Options], callback: Callable[..., None], about_it: str) -> None:
        self.options, sections = options, _sections(options)
        self.sections = {each.name: title for title, own in sections.items() for each in own}
        parameters = [each for own in sections.values() for each in own]
        if not set(sections) <= SHOWN:
            parameters.append(click.Option(["--help-all"], is_flag=True, is_eager=True, expose_value=False,
                                           callback=_show_all, help="Show all keys and exit."))  # fmt: skip
        super().__init__(name, help=about_it, callback=callback, params=parameters)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The ADDRESS of --ray may be left out, and --no-NAME of a key that may have several values is one of them."""
        listed = {each.opts[0] for each in self.params if each.metavar == "[LIST]"}
        args = [f"--{word.removeprefix('--no-')}=false" if word in listed else word for word in args]
        if "ray" in self.sections and "--ray" in args:
            after = args.index("--ray") + 1
            if after == len(args) or not re.fullmatch("auto|local|[^-].*:.*", args[after]):
                args = [*args[:after], "", *args[after:]]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                sections.setdefault(self.sections.get(parameter.name, OWN), []).append(record)
        always = SHOWN - {FEW} if RAY in sections else SHOWN
        rest = {title: own for title, own in sections.items() if title not in always}
        hidden = {} if ctx.meta.get(ALL) else rest
        for title, records in sections.items():
            if title not in hidden:
                shown = [(flags, LONG_LIST.sub("", text)) for flags, text in records] if hidden else records
                with formatter.section(title):
                    formatter.write_dl(shown)
        if hidden:
            count = sum(len(records) for records in hidden.values())
            formatter.write_paragraph()
            formatter.write_text(f"--help-all: {count} more. What a key may choose: fedsim list KEY")


class Positional(click.Argument):
    """A word without a flag, with its help."""

    def __init__(self, name: str, meaning: str, **settings: Any) -> None:
        super().__init__([name], **settings)
        self.meaning = meaning

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        return self.make_metavar(ctx), self.meaning


def _show_all(context: click.Context, parameter: click.Parameter, shown: bool) -> None:
    if shown:
        context.meta[ALL] = True
        click.echo(context.get_help())
        context.exit()


def _sections(options: type[Options]) -> dict[str, list[click.Parameter]]:
    """The title of each section of the help, and its parameters: arguments, keys used most, options, other keys."""
    sections: dict[str, list[click.Parameter]] = {ARGUMENTS: [], FIRST: [], OWN: [], RAY: []}
    for name, field in options.model_fields.items():
        if POSITIONAL in field.metadata:
            sections[ARGUMENTS].append(_argument(name, field))
        else:
            sections[RAY if name in RAY_OPTIONS else OWN] += _option(name, field)
    title, keys, few = "", options.keys, options.keys.only is not None
    for name in FIELDS:
        title = PANELS.get(name, title)
        if name in options.key_flags():
            own = sections.setdefault(FEW if few else FIRST if name in MOST_USED else title, [])
            own += _key(name, FIELDS[name], keys)
    return {title: own for title, own in sections.items() if own}


def _argument(name: str, field: FieldInfo) -> Positional:
    default = f" (default: {field.default})" if field.default else ""
    many = get_origin(field.annotation) is tuple
    settings: dict[str, Any] = {"nargs": -1 if many else 1, "shell_complete": completion_of(name, field)}
    return Positional(name, f"{about(field)}{default}", required=False, default=None, **settings)


def _option(name: str, field: FieldInfo) -> list[click.Parameter]:
    """The flags of an option; one that is on by default also has --no-NAME."""
    flag, meaning = f"--{kebab(name)}", about(field)
    if field.annotation is bool:
        flags = f"{flag}/--no-{kebab(name)}" if field.default else flag
        return [click.Option([name, flags], is_flag=True, default=None, help=meaning)]
    marks = next((each for each in field.metadata if isinstance(each, Flags)), Flags())
    listed = LIST in field.metadata
    default = ",".join(map(str, field.default)) if listed and field.default else field.default
    if field.is_required():
        meaning = f"{meaning} (must be given)"
    shown = f"{meaning} (default: {default})" if default and not field.is_required() else meaning
    value = marks.value or ("LIST" if listed else _kind(field))
    settings: dict[str, Any] = {"help": shown, "metavar": value, "shell_complete": completion_of(name, field)}
    if get_origin(field.annotation) is tuple and not listed:
        settings |= {"multiple": True, "default": None}
    return [click.Option([name, flag, *marks.others], **settings)]


def _kind(field: FieldInfo) -> str:
    """What stands for the value of a flag in its help."""
    (kind, *_) = get_args(field.annotation) or (field.annotation,)  # of `float | None`
    return KINDS.get(kind, "NAME")


def _key(name: str, field: FieldInfo, keys: Keys) -> list[click.Parameter]:
    """The flags of a key. Their value is None if they are not given, otherwise text that `Config` parses and checks."""
    flag, off = f"--{kebab(name)}", f"--no-{kebab(name)}"
    switch = field.annotation is bool
    default = "empty" if field.default == "" else str(field.default).lower() if switch else field.default
    settings: dict[str, Any] = {"help": f"{about(field)} (default: {keys.default or default})", "default": None}
    if not switch:
        completion = completion_of(name, field)
        return [click.Option([name, flag], metavar=_kind(field), shell_complete=completion, **settings)]
    if not keys.lists:
        return [click.Option([name, f"{flag}/{off}"], **settings)]
    return [click.Option([name, off, flag], is_flag=False, flag_value="true", metavar="[LIST]", **settings)]


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
