"""`massact train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from massact.cli.options import Json, Quiet, pair_of, printed, progress_bar, quiet_libraries
from massact.records.errors import UserError


def train(
    config: Annotated[str, typer.Option(help="gpt2-124m, llama-60m, vit-tiny or tiny; see --list.")] = "tiny",
    data: Annotated[
        str | None,
        typer.Option(
            help="Text, Markdown or JSONL file, a folder of them, the name of a data set (streamed), or an .npz file "
            "of images and labels; nothing: the embedded text."
        ),
    ] = None,
    attention: Annotated[str, typer.Option(help="Attention variant, see --list.")] = "softmax",
    out: Annotated[Path | None, typer.Option(help="Run directory for model, checkpoints and tables.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Field of the configuration: lr=1e-3, model.n_layer=4, ... Can be repeated."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the weights and of the order of the data.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted training in --out.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Show configurations and attention variants.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a model, any attention variant, and watch its massive activations appear or not.

    Several processes: accelerate launch -m massact train ...
    """
    options: dict[str, Any] = dict(pair_of(text, "--set", "lr=1e-3") for text in sets or ())
    given = {"variant": None if attention == "softmax" else attention, "steps": steps, "seed": seed}
    options |= {name: value for name, value in given.items() if value is not None}
    quiet_libraries()
    from massact.training import RECIPES, TrainConfig
    from massact.training import train as run_train

    if list_:
        _list_trainings(RECIPES)
        return
    chosen = TrainConfig.of(config, **options)  # before minutes are spent on loading
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
    printed(done, json, quiet)
    if not json and not quiet:
        typer.echo(f"\nSaved in {out}: model/, tables, train.json. Look into it: massact scan {out / 'model'}")


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
