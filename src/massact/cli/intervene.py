"""`massact intervene`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from massact.cli.options import (
    AllKeys,
    AllowPickle,
    CorpusNow,
    Device,
    Json,
    ModelNow,
    Quiet,
    Scanned,
    TrustRemoteCode,
    added,
    layers_of,
    load_options_of,
    progress_bar,
    quiet_libraries,
)
from massact.records.errors import UserError


def intervene(
    run: Scanned,
    model: ModelNow = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Edit: zero, mean, random, shuffle (these four by default), scale=F, clip=C, value=V, dims, "
            "cut-first, drop-first, norm-dims, weight=NAME[R,C], ... see docs/reference.md. Can be repeated.",
        ),
    ] = None,
    layer: Annotated[
        str, typer.Option(help="A layer with findings, several (3,5), onset (as the paper), or all that have any.")
    ] = "onset",
    corpus: CorpusNow = None,
    evaluate_on: Annotated[
        str | None,
        typer.Option(help="Another text for the effects (as --corpus of scan); means stay those of the scanned one."),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(help="Column of the JSONL file --evaluate-on (or --corpus): effects for each of its labels too."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Classes of images, for top-1 (Table 4): auto (of the corpus: class folders, CSV), or CSV."),
    ] = None,
    zero_shot: Annotated[
        bool, typer.Option("--zero-shot", help="Classify images by the names of their classes (CLIP, SigLIP).")
    ] = False,
    classes: Annotated[
        Path | None,
        typer.Option(help="Of --zero-shot: class names by number, one a line; nothing: those of the labels."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Of --zero-shot: prompts with {} for the name, one a line; nothing: five of ours."),
    ] = None,
    head: Annotated[
        Path | None,
        typer.Option(help="Linear head for a model of images without one (.safetensors, .pt): on [CLS], or on [CLS] "
                     "and the mean of the patches, as its width says."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks as well, with commas: piqa,winogrande,arc_easy (extra: tasks).")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder of lm-eval task files of one's own; these work offline.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task.")] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Only the entries that the scan found, not all of half their size or more.")
    ] = False,
    hold_out: Annotated[
        bool, typer.Option(help="Means of the first half of the sequences, effects on the second.")
    ] = True,
    all_keys: AllKeys = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 1,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of bootstrap and shuffle.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What happens without them: zero, mean, random and shuffle side by side?"""
    from massact.records.kinds.scan import open_run

    result = open_run(run)
    options = {"layer": layers_of(layer), "exact": exact, "hold_out": hold_out, "batch_size": batch_size, "seed": seed,
               "limit": limit, "all_keys": all_keys, "tasks": tuple(t for t in (tasks or "").split(",") if t),
               "task_folder": None if task_folder is None else str(task_folder)}  # fmt: skip
    options |= {"sets": tuple(sets)} if sets else {}
    quiet_libraries()
    from massact.interventions import InterveneConfig, intervene_run

    InterveneConfig.of(options)  # before minutes are spent on loading
    options |= {"labels": labels} if labels is not None else {}
    options |= head_asked(zero_shot, classes, prompts, head)
    with progress_bar(quiet or json) as progress:
        done = intervene_run(
            result, model=model, corpus=corpus, evaluate_on=evaluate_on, group=group, device=device, progress=progress,
            load_options=load_options_of(trust_remote_code, allow_pickle), options=options,
        )  # fmt: skip
    added(done, run, "effects.parquet, intervene.json", json, quiet)


def head_asked(zero_shot: bool, classes: Path | None, prompts: Path | None, head: Path | None) -> dict[str, Any]:
    """The head that was asked for."""
    from massact.interventions import ZeroShot

    if not zero_shot and (classes is not None or prompts is not None):
        raise UserError("--classes and --prompts are of zero-shot classification.", do="Add --zero-shot.")
    if zero_shot and head is not None:
        raise UserError("--zero-shot and --head exclude each other.", do="Give one of them.")
    if zero_shot:
        return {"head": ZeroShot.read(classes, prompts)}
    return {} if head is None else {"head": head}
