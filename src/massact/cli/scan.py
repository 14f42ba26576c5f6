"""`massact scan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from massact.cli.options import (
    AllowPickle,
    BatchSize,
    Device,
    Json,
    Preprocess,
    Quiet,
    TrustRemoteCode,
    batch_size_of,
    check_out,
    load_options_of,
    preprocess_of,
    printed,
    progress_bar,
    quiet_libraries,
    threshold_of,
)
from massact.records.errors import UserError


def scan(
    model: Annotated[str | None, typer.Argument(help="Hub id or local folder; nothing: the embedded model.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory for tables and figures.")] = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            help="Text, Markdown or JSONL file, a folder of them, or a data set name (wikitext-2, c4, pg19, redpajama, "
            "any Hub id); for models of images: a folder of them, a CSV with a column path; nothing: the embedded text."
        ),
    ] = None,
    preprocess: Preprocess = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens per sequence.")] = None,
    n_sequences: Annotated[int | None, typer.Option(min=1, help="Number of sequences.")] = None,
    criterion: Annotated[
        str, typer.Option(help="Published rule for what is massive, see docs/reference.md.")
    ] = "sun2024",
    threshold: Annotated[
        list[str] | None, typer.Option(help="Override a constant of the criterion: name=value. Can be repeated.")
    ] = None,
    bos: Annotated[str, typer.Option(help="auto (as the tokenizer does), always or never (as the paper).")] = "auto",
    prompt: Annotated[str | None, typer.Option(help="Prompt of the 3-D figure and Table 1.")] = None,
    batch_size: BatchSize = "auto",
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    top_k: Annotated[int, typer.Option(min=3, help="Greatest |h| kept per sequence and layer.")] = 16,
    null: Annotated[
        bool | None,
        typer.Option("--null/--no-null", help="Also scan a random-init twin (default: up to 500M parameters)."),
    ] = None,
    bos_contrast: Annotated[bool, typer.Option(help="Also scan a few sequences with and without BOS.")] = True,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted scan in --out.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Has this model massive activations: where, how large, how constant, how close to overflow?"""
    options: dict[str, Any] = {
        "criterion": criterion, "thresholds": dict(threshold_of(t) for t in threshold or ()), "seq_len": seq_len,
        "n_sequences": n_sequences, "bos": bos, "seed": seed, "top_k": top_k, "bos_contrast": bos_contrast,
        "batch_size": batch_size_of(batch_size), "null": "auto" if null is None else null,
        "preprocess": preprocess_of(preprocess),
    }  # fmt: skip
    if prompt is not None:
        options["prompt"] = prompt
    if resume and out is None:
        raise UserError("--resume needs the run directory.", do="Add --out DIR.")
    quiet_libraries()
    from massact.models import load
    from massact.reports import draw
    from massact.scans import criterion as criterion_named
    from massact.scans import scan as run_scan

    criterion_named(criterion).resolved(options["thresholds"])  # before minutes are spent on loading
    if out is not None:
        check_out(out, resume)
    with progress_bar(quiet or json) as progress:
        progress("load", 0, 1)
        loaded = load(
            model,
            device=device,
            dtype=dtype,
            revision=revision,
            options=load_options_of(trust_remote_code, allow_pickle),
        )
        progress("load", 1, 1)
        result = run_scan(loaded, corpus, out=out, resume=resume, progress=progress, **options)
    if out is not None:
        draw(result, out)
    printed(result, json, quiet)
    if not json and not quiet:
        typer.echo(
            f"\nSaved in {out}: tables, run.json, figures/. Print it again: massact show {out}"
            if out
            else "\nNot saved. Keep tables and figures with --out DIR."
        )
