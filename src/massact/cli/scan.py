"""`massact scan`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from massact.cli.options import (
    AllowPickle,
    BatchSize,
    Device,
    GgufFile,
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
from massact.records.errors import UserError, WorkError


def scan(
    model: Annotated[
        str | None, typer.Argument(help="Hub id, local folder, GGUF file or timm:NAME; nothing: the embedded model.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory for tables and figures.")] = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            help="Text, Markdown or JSONL file, a folder of them, or a data set name (wikitext-2, c4, pg19, redpajama, "
            "any Hub id); for models of images or sound (wav, flac): a folder of them, a CSV with a column path; for "
            "images with text: a JSONL file with columns image and text; nothing: the embedded text."
        ),
    ] = None,
    preprocess: Preprocess = None,
    pictures: Annotated[
        bool, typer.Option(help="Keep small pictures of the first 8 images in --out, for its figures.")
    ] = True,
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
    bos_contrast: Annotated[
        bool | None,
        typer.Option(
            "--bos-contrast/--no-bos-contrast",
            help="Also scan a few sequences with and without BOS "
            "(default: yes). Of several checkpoints this and --null are of the last, and off unless given.",
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    revisions: Annotated[
        str | None,
        typer.Option(
            help="Scan several revisions of a Hub model, each into its folder in --out, and draw the "
            "trajectory: step1000,step2000 or FIRST:LAST:STEP (step1000:step10000:1000)."
        ),
    ] = None,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="The same for a folder whose subfolders are checkpoints.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    gguf_file: GgufFile = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted scan in --out.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Has this model massive activations: where, how large, how constant, how close to overflow?"""
    options: dict[str, Any] = {
        "criterion": criterion, "thresholds": dict(threshold_of(t) for t in threshold or ()), "seq_len": seq_len,
        "n_sequences": n_sequences, "bos": bos, "seed": seed, "top_k": top_k, "batch_size": batch_size_of(batch_size),
        "preprocess": preprocess_of(preprocess), "pictures": pictures,
    }  # fmt: skip
    options |= {k: v for k, v in (("null", null), ("bos_contrast", bos_contrast)) if v is not None}
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
    load_options = load_options_of(trust_remote_code, allow_pickle, gguf_file)
    if revisions is not None or checkpoints:
        if revision is not None or (revisions is not None and checkpoints):
            raise UserError("--revision, --revisions and --checkpoints exclude each other.", do="Give one of them.")
        if out is None:
            raise UserError("A scan of several checkpoints needs a directory.", do="Add --out DIR.")
        loading = {"device": device, "dtype": dtype, "options": load_options}
        _scan_all(model, revisions, corpus, Asked(out, resume, json, quiet, loading, options))
        return
    _no_folder_of_checkpoints(model)
    if out is not None:
        check_out(out, resume)
    with progress_bar(quiet or json) as progress:
        progress("load", 0, 1)
        loaded = load(
            model,
            device=device,
            dtype=dtype,
            revision=revision,
            options=load_options,
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


@dataclass(frozen=True)
class Asked:
    """What was asked of a scan of several checkpoints, but for which."""

    out: Path
    resume: bool
    json: bool
    quiet: bool
    loading: dict[str, Any]
    options: dict[str, Any]


def _scan_all(model: str | None, revisions: str | None, corpus: str | None, asked: Asked) -> None:
    """Scan several checkpoints; those that fail are told at the end, with exit status 1."""
    from massact.records.kinds.scan import ScanResult
    from massact.reports import draw
    from massact.scans import checkpoints_in, revisions_of, scan_checkpoints, told

    found = checkpoints_in(model) if revisions is None else revisions_of(model, revisions)
    out, quiet = asked.out, asked.quiet or asked.json
    if not quiet:
        from massact.reports.spelling import visible

        names = [visible(c.name) for c in found]
        some = names if len(names) <= 12 else [*names[:6], "...", *names[-5:]]
        typer.echo(f"{len(names):,} checkpoint{'s' * (len(names) > 1)}: {', '.join(some)}", err=True)

    def each(result: ScanResult, folder: Path) -> None:
        if not (folder / "figures").is_dir():  # of a finished one they are there
            draw(result, folder)

    with progress_bar(quiet) as progress:
        done = scan_checkpoints(found, corpus, out=out, resume=asked.resume, progress=progress, each=each,
                                load_options=asked.loading, **asked.options)  # fmt: skip
    draw(done, out)
    printed(done, asked.json, asked.quiet)
    if not quiet:
        typer.echo(f"\nSaved in {out}: trajectory.json, revisions.parquet, figures/, and a run directory for each "
                   f"checkpoint. Print it again: massact show {out}")  # fmt: skip
    if failed := told(done.info):
        raise WorkError(f"{len(done.info.having('failed')):,} of {len(found):,} checkpoints could not be scanned.",
                        "\n".join(failed), "The others are finished: try these again with --resume.")  # fmt: skip


def _no_folder_of_checkpoints(model: str | None) -> None:
    """A folder of checkpoints instead of a model: say how they are scanned."""
    if model is None or not os.path.isdir(model) or os.path.isfile(os.path.join(model, "config.json")):
        return
    from massact.scans import checkpoints_in

    try:
        found = checkpoints_in(model)
    except UserError:
        return
    raise UserError(f"{model} is no model folder, but it holds {len(found):,} checkpoint{'s' * (len(found) > 1)}.",
                    do="Scan them all: --checkpoints. Or name one of them.")  # fmt: skip
