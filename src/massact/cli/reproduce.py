"""`massact reproduce`."""

from __future__ import annotations

import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from massact.cli.intervene import head_asked
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
    load_options_of,
    preprocess_of,
    printed,
    progress_bar,
    quiet_libraries,
    threshold_of,
)
from massact.records.errors import UserError, WorkError

OF_PROMPTS = ("magnitudes", "attention_maps", "trajectory")


def reproduce(
    target: Annotated[
        str | None,
        typer.Argument(
            help="Run directory of a scan, to which everything is added, or a model (Hub id or folder), which "
            "is scanned first; nothing: the embedded model."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory for a model. What is finished there is kept, not done again.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Experiments, E4,E17: only the steps that they need. Can be repeated.")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Print all experiments, and what each still needs.")] = False,
    model: Annotated[str | None, typer.Option(help="Where the model of the run lies now.")] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Text or images to scan, as of scan; of a run: where these lie now.")
    ] = None,
    preprocess: Preprocess = None,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens per sequence (the paper: 4096, Table 3 2048).")
    ] = None,
    n_sequences: Annotated[int | None, typer.Option(min=1, help="Number of sequences (the paper: 100).")] = None,
    threshold: Annotated[
        list[str] | None, typer.Option(help="Override a constant of the definition: name=value. Can be repeated.")
    ] = None,
    bos: Annotated[
        str | None,
        typer.Option(help="never (as the paper; of text the default), auto (as the tokenizer does) or always."),
    ] = None,
    evaluate_on: Annotated[
        list[str] | None,
        typer.Option(help="Further text for perplexity (E11): wikitext-2, c4, pg19, ... Can be repeated."),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Classes of images, for top-1 (E20, E22): auto (of the corpus), or CSV.")
    ] = None,
    zero_shot: Annotated[
        bool, typer.Option("--zero-shot", help="Classify images by the names of their classes (CLIP, SigLIP).")
    ] = False,
    classes: Annotated[Path | None, typer.Option(help="Of --zero-shot: class names by number, one a line.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Of --zero-shot: prompts with {}, one a line.")] = None,
    head: Annotated[
        Path | None, typer.Option(help="Linear head for a model of images without one (DINOv2-reg: Table 5).")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, with commas (E12; extra: tasks).")] = None,
    task_folder: Annotated[Path | None, typer.Option(help="Folder of lm-eval task files; these work offline.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task.")] = None,
    tuned: Annotated[str | None, typer.Option(help="A fine-tuned model of the same base (E25).")] = None,
    trained: Annotated[
        list[Path] | None, typer.Option(help="Run of a training (E18). Repeat it for each of two or more.")
    ] = None,
    published_as: Annotated[
        str | None, typer.Option("--as", help="The published model that this is, if its name does not say: LLaMA2-7B.")
    ] = None,
    batch_size: BatchSize = "auto",
    device: Device = "auto",
    dtype: Annotated[str | None, typer.Option(help="Of a model: auto (as stored), float32, bfloat16, float16.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    gguf_file: GgufFile = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what is in --out; it does so by itself.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Every experiment of the founding paper that applies to a model, beside what was published of it."""
    del resume
    is_run = target is not None and os.path.isfile(Path(target) / "run.json")
    options: dict[str, Any] = {
        "only": tuple(x.strip() for text in only or () for x in text.split(",") if x.strip()),
        "evaluate_on": tuple(evaluate_on or ()), "labels": labels, "limit": limit, "tuned": tuned, "seed": seed,
        "tasks": tuple(t for t in (tasks or "").split(",") if t), "published_as": published_as,
        "task_folder": None if task_folder is None else str(task_folder), "batch_size": batch_size_of(batch_size),
    }  # fmt: skip
    options |= head_asked(zero_shot, classes, prompts, head)
    asked: dict[str, Any] = {
        "preprocess": preprocess_of(preprocess), "thresholds": dict(threshold_of(t) for t in threshold or ()),
        "seq_len": seq_len, "n_sequences": n_sequences, "bos": bos,
    }  # fmt: skip
    asked = {name: value for name, value in asked.items() if value}
    if is_run and (out is not None or dtype is not None or asked):
        raise UserError(
            "--out, --dtype and the options of a scan are for a model, not for a run.", do="Leave them out."
        )
    quiet_libraries()
    if listed:
        _list(options | {"trained": bool(trained)}, Path(str(target)) if is_run else None)
        return
    from massact.records.kinds.comparison import Comparison, open_compared
    from massact.reports import compare, draw
    from massact.reproductions import reproduce as run_all

    compared = compare(open_compared(trained)) if trained else None
    loading = {"device": device, "options": load_options_of(trust_remote_code, allow_pickle, gguf_file)}

    def keep(result: Any, folder: Path) -> None:
        if isinstance(result, Comparison):
            draw(result, folder)
        else:  # of each prompt what the paper draws of it
            draw(result, folder, only=OF_PROMPTS if folder.parent.name == "prompts" else ())

    if not is_run:
        loading |= {} if dtype is None else {"dtype": dtype}
        asked |= {"seed": seed, "batch_size": options["batch_size"]}
    nowhere = not is_run and out is None
    with (
        tempfile.TemporaryDirectory() if nowhere else nullcontext() as scratch,
        progress_bar(quiet or json) as progress,
    ):
        place = Path(scratch) / "run" if scratch else out
        done = run_all(target, out=None if is_run else place, model=model, corpus=corpus, trained=compared,
                       scan_options=None if is_run else asked, loading=loading, watch=(progress, keep),
                       **options)  # fmt: skip
    printed(done, json, quiet)
    if not json and not quiet:
        where = target if is_run else out
        typer.echo("\nNot saved. Keep tables and figures with --out DIR." if nowhere else
                   f"\nIn {where}: reproduced.parquet, reproduce.json, and the tables and figures of every step. "
                   f"Print it again: massact show {where}")  # fmt: skip
    if failed := done.info.having("failed"):
        said = "\n".join(f"{name}: {done.info.steps[name].get('why', '')}" for name in failed)
        raise WorkError(f"{len(failed)} of {len(done.info.steps)} steps failed.", said, "The others are finished.")


def _list(options: dict[str, Any], run: Path | None) -> None:
    from massact.records.kinds.scan import open_run
    from massact.reproductions import listing

    for entry, lacks in listing(options, None if run is None else open_run(run)):
        needs = ", ".join(entry.needs)
        typer.echo(f"{entry.id:<4} {entry.title} ({entry.section}; steps: {needs})" + (f": {lacks}" if lacks else ""))
