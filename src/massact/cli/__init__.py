"""The command line: made of the verbs that there are. Heavy imports happen only when one runs."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress
from typing import Annotated, Any

import typer

from massact.cli import output
from massact.cli.commands import command
from massact.cli.compare import compare
from massact.cli.help_pages import HelpCommand, HelpGroup, print_version
from massact.cli.interrupts import AGAIN
from massact.cli.report import report
from massact.cli.show import show
from massact.records.disk import disk_full
from massact.records.errors import MassactError
from massact.verbs import verbs

app = typer.Typer(
    name="massact",
    cls=HelpGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # a third of a second of imports; what it adds is in `help_pages`
    pretty_exceptions_enable=False,
    help="Find, explain, remove and train away massive activations in transformers.",
)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=print_version, is_eager=True, help="Print the version, and end.")
    ] = False,
) -> None:
    """Find, explain, remove and train away massive activations in transformers."""


for _verb in verbs().values():
    app.command(cls=HelpCommand)(command(_verb))
for _reading in (compare, show, report):
    app.command(cls=HelpCommand)(_reading)


def main() -> None:
    """Entry point: every error is one message and an exit status, never a traceback."""
    # The click that typer brings is not always the package of that name: ask typer for its error.
    usage_error: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
    gc.set_threshold(20_000)  # a hundred thousand objects of modules that stay are looked at again and again otherwise
    out = output.prepare()
    try:
        status = app(standalone_mode=False)
        if status == 130:  # how typer hands on Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()
        _end(out, "", status if isinstance(status, int) else 0)
    except MassactError as error:
        _end(out, str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _end(out, f"Interrupted. {AGAIN}", 130)
    except usage_error as error:
        with suppress(OSError):
            error.show()
        _end(out, "", error.exit_code)
    except SystemExit as error:  # how typer hands on a broken pipe
        if isinstance(out.why(), BrokenPipeError):
            raise SystemExit(output.GONE) from None
        raise error
    except Exception as error:
        if os.environ.get("MASSACT_TRACEBACK"):
            raise
        _end(out, *_of_any(error, out.why()))


def _of_any(error: Exception, unprinted: OSError | None) -> tuple[str, int]:
    """Message and exit status of an error that no verb tells: of stdout, of a full disk, or a defect."""
    if isinstance(error, BrokenPipeError) or isinstance(unprinted, BrokenPipeError):
        return "", output.GONE
    if unprinted is not None:
        return (
            f"What was to be printed could not be: stdout: {unprinted.strerror or unprinted}.\n"
            "Files are written before anything is printed: they are whole.\nPrint it to a terminal, or into a file on "
            "a disk with room.", 1,
        )  # fmt: skip
    if disk_full(error):
        return f"The disk is full: {error}\nMake room, then run the command again (a scan with --resume).", 1
    return (
        f"massact failed: {type(error).__name__}: {error}\nThis is a defect of massact, or of a library under it. "
        "Run again with MASSACT_TRACEBACK=1 and report what it prints.", 1,
    )  # fmt: skip


def _end(out: output.Stdout, message: str, status: int) -> None:
    out.why()
    if message:
        output.complain(f"error: {message}")
    sys.stdout = out.stream
    sys.exit(status)
