"""`massact explain`."""

from __future__ import annotations

from typing import Annotated

import typer

from massact.cli.options import (
    AllKeys,
    AllowPickle,
    BatchSize,
    CorpusNow,
    Device,
    Json,
    ModelNow,
    Quiet,
    Scanned,
    TrustRemoteCode,
    added,
    batch_size_of,
    load_options_of,
    progress_bar,
    quiet_libraries,
)


def explain(
    run: Scanned,
    model: ModelNow = None,
    corpus: CorpusNow = None,
    n_sequences: Annotated[int | None, typer.Option(min=1, help="Sequences, from the start; nothing: all.")] = None,
    all_keys: AllKeys = True,
    eps: Annotated[float, typer.Option(help="A key is a sink of a head if its mean mass exceeds this.")] = 0.3,
    batch_size: BatchSize = "auto",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the random tokens that results are compared with.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Why are they there: attention on them, the bias they add, who writes them?"""
    from massact.records.kinds.scan import open_run

    result = open_run(run)
    options = {"n_sequences": n_sequences, "columns": all_keys, "eps": eps, "seed": seed,
               "batch_size": batch_size_of(batch_size)}  # fmt: skip
    quiet_libraries()
    from massact.explanations import ExplainConfig, explain_run

    ExplainConfig.of(options)  # before minutes are spent on loading
    with progress_bar(quiet or json) as progress:
        explanation = explain_run(
            result, model=model, corpus=corpus, device=device, progress=progress,
            load_options=load_options_of(trust_remote_code, allow_pickle), options=options,
        )  # fmt: skip
    added(explanation, run, "tables, explain.json", json, quiet)
