"""A verb: its name, what it asks, its options and what does it; and all verbs that there are."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import massact.verbs
from massact.records.errors import UserError, WorkError
from massact.records.extensions import extensions, modules_in
from massact.verbs.inputs import Inputs
from massact.verbs.options import Options


def named(where: str) -> Callable[..., Any]:
    """The function that "package.module:function" names, imported."""
    module, _, name = where.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


NOT_SAVED = "Not saved. Keep tables and figures with --out DIR."


@dataclass(frozen=True)
class Verb:
    """One verb of the command line.

    Args:
        name: as it is called.
        asks: its question, the first line of its help.
        inputs: what it is given; options: what can be set. Of both the command line is made.
        job: "package.module:function" of a verb on a scan, called with what the scan is of, as
            `job(model, corpus, scan, progress=..., **options)`; gives a result, which is added to the scan's directory.
        run: in its place, of any other verb: called with the `Call`; gives a `Done`. Both are imported when the verb
            runs, so that `--help` needs no torch.
        check: "package.module:function" called with the options before minutes are spent on loading.
        lists: the same called with the `Call` where --list is given; gives the lines to print.
        noun: what can be gone on with after an interrupt ("A scan"); nothing: it begins again.
        by_itself: whether the same command goes on without --resume.
        place: the place in the list of verbs.
    """

    name: str
    asks: str
    inputs: type[Inputs]
    options: type[Options]
    job: str = ""
    run: str = ""
    check: str = ""
    lists: str = ""
    noun: str = ""
    by_itself: bool = False
    place: int = 100

    def __post_init__(self) -> None:
        if bool(self.job) == bool(self.run):
            raise UserError(f"The verb {self.name!r} has {'both' * bool(self.job) or 'neither'} job and run.",
                            do="Give one of them.")  # fmt: skip


@dataclass
class Done:
    """What a verb leaves to be printed.

    Args:
        result: of any kind.
        said: the closing line.
        failed: what could not be done, told after the rest.
        folder: of the figures, which are drawn once the answer stands there; None: there are none.
    """

    result: Any
    said: str
    failed: WorkError | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Call:
    """A verb that was called.

    Args:
        inputs, options: as they were given.
        progress: called with (stage, done, in all).
        say: prints a line on stderr, unless all is to be quiet.
        keep: draws the figures of a result into its folder, of those that are not the last of a call.
        scan: of the run that was given; None where none was.
    """

    verb: Verb
    inputs: Any
    options: Any
    progress: Callable[..., None]
    say: Callable[[str], None]
    keep: Callable[..., object]
    scan: Any = None

    def added(self, result: Any, out: Path | None) -> Done:
        """Keep what was found beside the scan that it is of."""
        if out is None:
            return Done(result, NOT_SAVED)
        result.save(out)
        tables = [f"{name}.parquet" for name in result.tables()]
        files = ", ".join(
            [*(tables if len(tables) < 3 else ["tables"]), result.FILE, *["figures/"] * bool(self.inputs.formats())]
        )
        return Done(result, f"Added to {out}: {files}. Print it again: massact show {out}", folder=out)


@cache
def verbs() -> dict[str, Verb]:
    """Name -> verb, of all that there are: one file each here, and entry points of the group `massact.verbs`.

    Raises:
        UserError: what another package names is no verb, or is called like another.
    """
    found = [module.VERB for module in modules_in(massact.verbs).values() if hasattr(module, "VERB")]
    ours = {verb.name: verb for verb in sorted(found, key=lambda verb: verb.place)}
    return extensions("massact.verbs", Verb, ours)
