"""What is printed, and what happens where it cannot be: stdout closed, on a full disk, or a pipe that nobody reads."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import Any

import typer
from rich.console import Console

GONE = 141  # the reader of a pipe has left: the status that a shell gives a program which SIGPIPE ended


class Stdout:
    """stdout, which remembers that it failed; where it was closed before we began, writing fails.

    Args:
        stream: what is written to; None: it was closed.
    """

    def __init__(self, stream: Any) -> None:
        self.stream, self.error = stream, None if stream is not None else _closed()
        self.failed = False  # something was to be printed, and could not be

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream if self.stream is not None else sys.__stderr__, name)

    def write(self, text: str) -> int:
        if self.stream is None:
            self.failed = self.failed or bool(text)
            raise _closed()
        return self._noted(self.stream.write, text)

    def flush(self) -> None:
        if self.stream is not None:
            self._noted(self.stream.flush)

    def _noted(self, do: Any, *given: Any) -> Any:
        try:
            return do(*given)
        except OSError as error:
            self.failed, self.error = True, error
            raise

    def why(self) -> OSError | None:
        """Why it takes nothing more; None where it does. What it still held is given up, silently."""
        with suppress(OSError):
            self.flush()
        if not self.failed:
            return None
        silence(self.stream)
        return self.error


class Terminal(Console):
    """A console that leaves it to the command line what a broken pipe means."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def print_result(result: Any, json: bool, quiet: bool) -> None:
    """Print a result of any kind: as JSON, or readable unless it must be quiet."""
    from massact.reports import show, to_json

    if json:
        typer.echo(to_json(result))
    elif not quiet:
        show(result, Terminal())


def prepare() -> Stdout:
    """Take the places of closed streams: the next file to be opened would get their number, and what is printed."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number: this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may hold what no terminal can show
    out = Stdout(sys.stdout.stream if isinstance(sys.stdout, Stdout) else sys.stdout)
    sys.stdout = out
    return out


def complain(message: str) -> None:
    """Print an error on stderr; where that is closed or full too, the exit status has to do."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def silence(stream: Any) -> None:
    """Let a stream lead nowhere, so that what it holds is not tried, and told, once more at the end of the process."""
    with suppress(OSError, ValueError, AttributeError):  # a stream of a test, or of a notebook, has no number
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
        stream.flush()


def _closed() -> OSError:
    return OSError(errno.EBADF, "it is closed")
