"""`massact train`."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from massact.cli.options import Json, Quiet, pair_of, printed, progress_bar, quiet_libraries
from massact.cli.toy_lab import toy_lab
from massact.records.errors import MassactError, UserError


def train(
    config: Annotated[
        str | None,
        typer.Option(
            help="gpt2-124m, llama-60m, vit-tiny or tiny (default); see --list. Of a task: story (default), or guo for "
            "the published sizes."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="A toy lab of small models, one for each --attention, side by side: bigram-backcopy."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text, Markdown or JSONL file, a folder of them, the name of a data set (streamed), or an .npz file "
            "of images and labels; nothing: the embedded text."
        ),
    ] = None,
    attention: Annotated[
        list[str] | None,
        typer.Option(
            help="Attention variant, see --list; nothing: softmax. Of a task it can be repeated; nothing: softmax, "
            "kv-bias and softmax-off-by-one."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory for model, checkpoints and tables.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Field of the configuration: lr=1e-3, model.n_layer=4, ... Can be repeated."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the weights and of the order of the data.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted training in --out.")] = False,
    scan: Annotated[
        bool, typer.Option(help="Scan and explain the trained model over held-out windows, into OUT/scan.")
    ] = True,
    list_: Annotated[bool, typer.Option("--list", help="Show configurations and attention variants.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a model, any attention variant, and watch its massive activations appear or not.

    Several processes: accelerate launch -m massact train ...
    """
    options: dict[str, Any] = dict(pair_of(text, "--set", "lr=1e-3") for text in sets or ())
    options |= {name: value for name, value in {"steps": steps, "seed": seed}.items() if value is not None}
    if task is not None and not list_:
        toy_lab(task, config, attention, options, out, json, quiet, data=data, resume=resume)
        return
    if len(attention or ()) > 1:
        raise UserError("A training has one attention variant.", do="Train once for each, then: massact compare.")
    if attention and attention != ["softmax"]:
        options["variant"] = attention[0]
    quiet_libraries()
    from massact.training import RECIPES, TrainConfig
    from massact.training import train as run_train

    if list_:
        _list_trainings(RECIPES)
        return
    chosen = TrainConfig.of(config or "tiny", **options)  # before minutes are spent on loading
    if out is None:
        raise UserError("A training needs a run directory.", do="Add --out DIR.")
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks
        json, quiet = False, True
    with progress_bar(quiet or json) as progress:
        last: dict[str, Any] = {}
        done = run_train(
            chosen, out, data, resume=resume, on_row=last.update,
            progress=lambda stage, n, total: progress(stage, n, total, _loss_line(last) if stage == "train" else ""),
        )  # fmt: skip
    first = os.environ.get("RANK", "0") == "0"
    scanned = _scan(done, out, chosen, data, quiet or json) if scan and first else None
    printed(done, json, quiet)
    if not json and not quiet:
        look = f"scan/. Print the scan: massact show {scanned}" if scanned else f"Scan it: massact scan {out / 'model'}"
        typer.echo(f"\nSaved in {out}: model/, tables, train.json{', ' if scanned else '. '}{look}")


def _scan(done: Any, out: Path, config: Any, data: str | None, quiet: bool) -> Path | None:
    """Scan the trained model; where that fails, say so: the training stands."""
    from massact.cli.closing_scan import scan_trained
    from massact.records.sidecars import write_sidecar

    failed, notes = "The trained model could not be scanned", done.info.notes
    try:
        with progress_bar(quiet) as progress:
            place = scan_trained(out, config, data, progress)
        kept = [note for note in notes if not note.startswith(failed)]
    except Exception as error:  # whatever it is, hours of training are not to end in an error
        if os.environ.get("MASSACT_TRACEBACK"):
            raise
        why = str(error) if isinstance(error, MassactError) else f"{type(error).__name__}: {error}"
        place, kept = None, [*(note for note in notes if not note.startswith(failed)), f"{failed}: {_line(why)}"]
        again = f"Its training is whole. Try again: massact scan {out / 'model'}"
        typer.echo(f"warning: {kept[-1]}\n{again}", err=True)
    if kept != notes:
        done.info.notes = kept
        with suppress(OSError, MassactError):  # a full disk may be why; it was said on the screen
            write_sidecar(out / "train.json", done.info)
    return place


def _line(text: str) -> str:
    return " ".join(text.split())


def _list_trainings(recipes: Any) -> None:
    """What can be trained."""
    from massact.training import VARIANTS

    for name, c in recipes.items():
        typer.echo(f"{name}: {c.steps:,} steps of {c.tokens_per_step:,} {'images' if c.images else 'tokens'}")
        for note in c.notes:
            typer.echo(f"    {note}")
    typer.echo("\nAttention variants:")
    for name, variant in VARIANTS.items():
        typer.echo(f"    {name}: {variant.formula} ({variant.source})")


def _loss_line(row: dict[str, Any]) -> str:
    return f"loss {row['loss']:.3f}" if row.get("loss") == row.get("loss") and "loss" in row else ""
