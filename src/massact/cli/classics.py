"""`massact classics`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from massact.cli.options import (
    AllowPickle,
    CorpusNow,
    Device,
    GgufFile,
    Json,
    Preprocess,
    Quiet,
    TrustRemoteCode,
    check_out,
    load_options_of,
    preprocess_of,
    printed,
    progress_bar,
    quiet_libraries,
)
from massact.records.errors import UserError


def classics(
    target: Annotated[
        str | None,
        typer.Argument(help="Run directory of a scan, or a model (Hub id or folder), which is scanned first; "
                       "nothing: the embedded model."),
    ] = None,
    which: Annotated[
        list[str] | None, typer.Option(help="One of those that --list prints. Can be repeated; default: all.")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Print all entries with their sources.")] = False,
    out: Annotated[Path | None, typer.Option(help="Run directory for a model; a run gets its tables added.")] = None,
    model: Annotated[str | None, typer.Option(help="Where the model of the run lies now.")] = None,
    corpus: CorpusNow = None,
    preprocess: Preprocess = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens per sequence, for a model.")] = None,
    n_sequences: Annotated[int | None, typer.Option(min=1, help="Sequences, from the start; nothing: all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass of paired runs.")] = 1,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of pairs, random controls and bootstraps.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    gguf_file: GgufFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What do the classic outlier works find on this model: outlier features, rogue dims, bias roles, ...?"""
    from massact.records.kinds.scan import open_run

    is_run = target is not None and os.path.isfile(Path(target) / "run.json")
    if is_run and (out is not None or seq_len is not None or preprocess):
        raise UserError("--out, --seq-len and --preprocess are for a model, not for a run.", do="Leave them out.")
    result = open_run(Path(str(target))) if is_run else None
    quiet_libraries()
    from massact.classics import CLASSICS, ClassicsConfig, classics_anew, classics_run
    from massact.models import load
    from massact.reports import draw

    if listed:
        for entry in CLASSICS.values():
            typer.echo(f"{entry.name:<18} {entry.asks} ({entry.source})")
        return
    options = {"which": tuple(which or ()), "batch_size": batch_size, "seed": seed}
    options |= {"n_sequences": n_sequences} if is_run else {}
    ClassicsConfig.of(options)  # before minutes are spent on loading
    load_options = load_options_of(trust_remote_code, allow_pickle, gguf_file)
    if out is not None:
        check_out(out, resume=False)
    with progress_bar(quiet or json) as progress:
        if result is not None:
            done = classics_run(
                result, model=model, corpus=corpus, device=device, progress=progress, load_options=load_options,
                options=options,
            )  # fmt: skip
            out = Path(str(target))
        else:
            loaded = load(target, device=device, options=load_options)
            asked = {"seq_len": seq_len, "n_sequences": n_sequences, "seed": seed,
                     "preprocess": preprocess_of(preprocess)}  # fmt: skip
            result, done = classics_anew(loaded, corpus, scan_options=asked, progress=progress, options=options)
            if out is not None:
                result.save(out)
                draw(result, out)
    if out is not None:
        done.save(out)
        draw(done, out)
    printed(done, json, quiet)
    if not json and not quiet:
        typer.echo(
            f"\nAdded to {out}: classics.parquet, classic_effects.parquet, classics.json, figures/. Print it again: "
            f"massact show {out}"
            if out else "\nNot saved. Keep tables and figures with --out DIR."
        )  # fmt: skip
