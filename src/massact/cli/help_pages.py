"""What `--help` looks like: colours on a terminal, options in groups; at the cost of plain text."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

import massact

MOST_COLUMNS = 100
# Of what a report of a defect must name.
UNDER = ("torch", "transformers")


_Plain: Any = typer.Context.formatter_class  # the click that typer brings is not always the package of that name


class _Formatter(_Plain):
    """Colours are always written: what is printed elsewhere than on a terminal loses them on the way."""

    def write_heading(self, heading: str) -> None:
        self.write(f"{'':>{self.current_indent}}{_colored(f'{heading}:', bold=True)}\n")

    def write_dl(self, rows: Any, *given: Any, **options: Any) -> None:
        super().write_dl([(_colored(name, fg="cyan"), text) for name, text in rows], *given, **options)


class HelpCommand(TyperCommand):
    """A command whose options stand in groups."""

    def get_help(self, ctx: Any) -> str:
        return _page(self, ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_groups(self, ctx, formatter)


class HelpGroup(TyperGroup):
    """A group of commands, told in the order in which they are used."""

    def get_help(self, ctx: Any) -> str:
        return _page(self, ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, " ".join((made.help or "").split())) for name, made in commands if made is not None]
            )
        _write_groups(self, ctx, formatter)


def _page(command: Any, ctx: Any) -> str:
    formatter = _Formatter(width=ctx.terminal_width, max_width=ctx.max_content_width or MOST_COLUMNS)
    command.format_help(ctx, formatter)
    text: str = formatter.getvalue()
    return text.rstrip("\n")


def _write_groups(command: Any, ctx: Any, formatter: Any) -> None:
    groups: dict[str, list[tuple[str, str]]] = {}
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx)
        usual = "Arguments" if param.param_type_name == "argument" else "Options"
        if record is not None:
            groups.setdefault(getattr(param, "rich_help_panel", None) or usual, []).append(record)
    for name, rows in groups.items():
        with formatter.section(name):
            formatter.write_dl(rows)


def _colored(text: str, **look: Any) -> str:
    return text if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else typer.style(text, **look)


def print_version(asked: bool) -> None:
    """Print the version, and those of what lies under it; then end."""
    if asked:
        under = [f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in UNDER)]
        typer.echo(f"massact {massact.__version__} ({', '.join(under)})")
        raise typer.Exit


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
