"""What verbs share: their options, how these are read, the progress bar, and printing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from massact.records.errors import UserError

Json = Annotated[bool, typer.Option("--json", help="Print the records as JSON instead of tables.")]
Scanned = Annotated[Path, typer.Argument(help="Run directory of a scan; tables and figures are added to it.")]
ModelNow = Annotated[
    str | None, typer.Argument(help="Where the scanned model lies now; nothing: where the scan had it.")
]
CorpusNow = Annotated[
    str | None,
    typer.Option(
        help="Where the scanned text (images, recordings) lies now, or another, which is scanned first (as `scan`)."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no tables.")]
AllKeys = Annotated[
    bool, typer.Option(help="Also the mass on every key and the entropy: one more call of the attention kernel.")
]
Preprocess = Annotated[
    list[str] | None,
    typer.Option(
        "--preprocess",
        help="Of images, where it is to differ from the model's processor: resize=256 (short side) or 224x224, "
        "crop=224, resample=bicubic, mean=0.5, std=0.5 (or three with commas). Can be repeated.",
    ),
]
BatchSize = Annotated[str, typer.Option(help="Sequences per forward pass, or auto.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read .bin weights, with weights_only=True.")]

GgufFile = Annotated[
    str | None, typer.Option("--gguf-file", help="Name of a GGUF file in the folder or repository that MODEL names.")
]


def printed(result: Any, json: bool, quiet: bool) -> None:
    """Print a result: as JSON, or readable unless it must be quiet."""
    from massact.cli.output import Terminal
    from massact.reports import show, to_json

    if json:
        typer.echo(to_json(result))
    elif not quiet:
        show(result, Terminal())


def added(done: Any, run: Path, what: str, json: bool, quiet: bool) -> None:
    """Keep what a verb found beside the scan it is of, draw it, print it, and say where it is."""
    from massact.reports import draw

    done.save(run)
    draw(done, run)
    printed(done, json, quiet)
    if not json and not quiet:
        typer.echo(f"\nAdded to {run}: {what}, figures/. Print it again: massact show {run}")


def load_options_of(trust_remote_code: bool, allow_pickle: bool, gguf_file: str | None = None) -> dict[str, Any]:
    """The options of `load` that were asked for."""
    asked = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle, "gguf_file": gguf_file}
    return {name: value for name, value in asked.items() if value}


def pair_of(text: str, option: str, example: str) -> tuple[str, str]:
    """Name and value of an option name=value."""
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise UserError(f"{option} {text!r} is not name=value.", do=f"For example: {option} {example}")
    return name.strip(), value


def threshold_of(text: str) -> tuple[str, float]:
    """A constant of a criterion, given as name=value."""
    name, sign, value = text.partition("=")
    try:
        if sign and name:
            return name.strip(), float(value)
    except ValueError:
        pass
    raise UserError(f"--threshold {text!r} is not name=value.", do="For example: --threshold magnitude=50")


def batch_size_of(text: str) -> int | str:
    """A batch size, or auto."""
    if text == "auto":
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise UserError(f"--batch-size {text!r} is neither auto nor a number from 1 on.")


def preprocess_of(texts: list[str] | None) -> dict[str, str]:
    """Steps of the preprocessing of images, given as name=value."""
    return dict(pair_of(text, "--preprocess", "resize=256") for text in texts or ())


def layers_of(text: str) -> int | str | tuple[int, ...]:
    """One layer, several with commas, or a word for them."""
    parts = text.split(",")
    if all(part.strip().isdecimal() for part in parts):
        return int(parts[0]) if len(parts) == 1 else tuple(int(part) for part in parts)
    if text in ("onset", "all"):
        return text
    raise UserError(f"--layer {text!r} is no layer.", do="Give a number, several (3,5), onset or all.")


def check_out(out: Path, resume: bool) -> None:
    """Refuse a directory that cannot be used before minutes are spent on the model."""
    from massact.records.run import claim, read_info
    from massact.records.runinfo import RunInfo

    if resume and os.path.isfile(out / "run.json"):
        read_info(out)
        return
    made = [folder for folder in (out, *out.parents) if not os.path.exists(folder)]
    claim(out, RunInfo("scan"))
    for folder in made:
        folder.rmdir()


@contextmanager
def progress_bar(off: bool) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=off or not console.is_terminal,
        transient=True,
    ) as bar:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total, description=f"{stage} {note}".rstrip())

        yield update


def quiet_libraries() -> None:
    """Our errors say what went wrong; the libraries' own chatter would bury them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
