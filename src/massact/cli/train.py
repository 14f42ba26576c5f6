"""`massact train`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from massact.cli.closing_scan import scan_trained
from massact.cli.toy_lab import toy_lab
from massact.records.errors import MassactError, UserError
from massact.records.sidecars import write_sidecar
from massact.verbs import Call, Done
from massact.verbs.options import pair_of


def run(call: Call) -> Done:
    """Train a model, and scan it; or a toy lab."""
    asked, out = call.options, call.inputs.out
    options: dict[str, Any] = dict(pair_of(text, "--set", "lr=1e-3") for text in asked.sets)
    options |= {name: getattr(asked, name) for name in ("steps", "seed", "start") if getattr(asked, name) is not None}
    if asked.task is not None:
        return toy_lab(call, options)
    if len(asked.attention) > 1:
        raise UserError("A training has one attention variant.", do="Train once for each, then: massact compare.")
    if asked.attention and asked.attention != ("softmax",):
        options["variant"] = asked.attention[0]
    from massact.training import TrainConfig, train

    chosen = TrainConfig.of(asked.config or "tiny", **options)  # before minutes are spent on loading
    if out is None:
        raise UserError("A training needs a run directory.", do="Add --out DIR.")
    last: dict[str, Any] = {}

    def progress(stage: str, done: int, total: int) -> None:
        call.progress(stage, done, total, _loss_line(last) if stage == "train" else "")

    done = train(chosen, out, asked.data, resume=call.inputs.resume, on_row=last.update, progress=progress)
    first = os.environ.get("RANK", "0") == "0"
    scanned = _scan(done, call, chosen) if asked.scan and first else None
    look = f"scan/. Print the scan: massact show {scanned}" if scanned else f"Scan it: massact scan {out / 'model'}"
    return Done(done, f"Saved in {out}: model/, tables, train.json{', ' if scanned else '. '}{look}")


def _scan(done: Any, call: Call, config: Any) -> Path | None:
    """Scan the trained model; where that fails, say so: the training stands."""
    out = call.inputs.out
    failed, notes = "The trained model could not be scanned", done.info.notes
    try:
        place = scan_trained(out, config, call.options.data, call.progress)
        kept = [note for note in notes if not note.startswith(failed)]
    except Exception as error:  # whatever it is, hours of training are not to end in an error
        if os.environ.get("MASSACT_TRACEBACK"):
            raise
        why = str(error) if isinstance(error, MassactError) else f"{type(error).__name__}: {error}"
        place, kept = None, [*(note for note in notes if not note.startswith(failed)), f"{failed}: {_line(why)}"]
        typer.echo(f"warning: {kept[-1]}\nIts training is whole. Try again: massact scan {out / 'model'}", err=True)
    if kept != notes:
        done.info.notes = kept
        with suppress(OSError, MassactError):  # a full disk may be why; it was said on the screen
            write_sidecar(out / "train.json", done.info)
    return place


def _line(text: str) -> str:
    return " ".join(text.split())


def listed(call: Call) -> Iterator[str]:
    """What can be trained."""
    from massact.training import RECIPES
    from massact.variants.registry import variants

    for name, c in RECIPES.items():
        yield f"{name}: {c.steps:,} steps of {c.tokens_per_step:,} {'images' if c.images else 'tokens'}"
        yield from (f"    {note}" for note in c.notes)
    yield "\nAttention variants:"
    yield from (f"    {name}: {variant.formula} ({variant.source})" for name, variant in variants().items())


def _loss_line(row: dict[str, Any]) -> str:
    return f"loss {row['loss']:.3f}" if row.get("loss") == row.get("loss") and "loss" in row else ""
