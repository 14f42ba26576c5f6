"""The command line: parse, call one function, print. Heavy imports happen only when a verb runs."""

from __future__ import annotations

import os
import sys

import typer

from massact.cli.classics import classics
from massact.cli.compare import compare
from massact.cli.explain import explain
from massact.cli.intervene import intervene
from massact.cli.report import report
from massact.cli.reproduce import reproduce
from massact.cli.scan import scan
from massact.cli.show import show
from massact.cli.train import train
from massact.records.errors import MassactError

app = typer.Typer(
    name="massact",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Find, explain, remove and train away massive activations in transformers.",
)


@app.callback()
def _root() -> None:
    """Find, explain, remove and train away massive activations in transformers."""


for _verb in (scan, explain, intervene, classics, reproduce, train, compare, show, report):
    app.command()(_verb)


def main() -> None:
    """Entry point: every error is one message and an exit status, never a traceback."""
    # The click that typer brings is not always the package of that name: ask typer for its error.
    usage_error = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may hold what no terminal can show
    try:
        status = app(standalone_mode=False)
        if status == 130:  # how typer hands on Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()
        sys.exit(status if isinstance(status, int) else 0)
    except MassactError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("Interrupted. What was finished is kept: go on with the same command and --resume.", 130)
    except usage_error as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if os.environ.get("MASSACT_TRACEBACK"):
            raise
        _fail(
            f"massact failed: {type(error).__name__}: {error}\nThis is a defect of massact, or of a library under it. "
            "Run again with MASSACT_TRACEBACK=1 and report what it prints.",
            1,
        )


def _fail(message: str, status: int) -> None:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
