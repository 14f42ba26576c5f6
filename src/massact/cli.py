"""The command line: parse, call one function, print. Heavy imports happen only when a verb runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from massact.records.errors import MassactError, UserError

app = typer.Typer(
    name="massact",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Find, explain, remove and train away massive activations in transformers.",
)

Json = Annotated[bool, typer.Option("--json", help="Print the records as JSON instead of tables.")]
Scanned = Annotated[Path, typer.Argument(help="Run directory of a scan; tables and figures are added to it.")]
ModelNow = Annotated[
    str | None, typer.Argument(help="Where the scanned model lies now; nothing: where the scan had it.")
]
CorpusNow = Annotated[
    str | None,
    typer.Option(help="Where the scanned text lies now, or another text, which is scanned first (as `scan`)."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no tables.")]
BatchSize = Annotated[str, typer.Option(help="Sequences per forward pass, or auto.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read .bin weights, with weights_only=True.")]


@app.callback()
def _root() -> None:
    """Find, explain, remove and train away massive activations in transformers."""


@app.command()
def scan(
    model: Annotated[str | None, typer.Argument(help="Hub id or local folder; nothing: the embedded model.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory for tables and figures.")] = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            help="Text, Markdown or JSONL file, a folder of them, or a data set name (wikitext-2, c4, pg19, redpajama, "
            "any Hub id); nothing: the embedded text."
        ),
    ] = None,
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
        "criterion": criterion, "thresholds": dict(_threshold(t) for t in threshold or ()), "seq_len": seq_len,
        "n_sequences": n_sequences, "bos": bos, "seed": seed, "top_k": top_k, "bos_contrast": bos_contrast,
        "batch_size": _batch_size(batch_size), "null": "auto" if null is None else null,
    }  # fmt: skip
    if prompt is not None:
        options["prompt"] = prompt
    if resume and out is None:
        raise UserError("--resume needs the run directory.", do="Add --out DIR.")
    _quiet_libraries()
    from massact import load  # connects training, which reads checkpoints with an attention variant
    from massact.reports import draw
    from massact.scans import criterion as criterion_named
    from massact.scans import scan as run_scan

    criterion_named(criterion).resolved(options["thresholds"])  # before minutes are spent on loading
    if out is not None:
        _check_out(out, resume)
    with _progress(quiet or json) as progress:
        progress("load", 0, 1)
        loaded = load(
            model,
            device=device,
            dtype=dtype,
            revision=revision,
            options=_load_options(trust_remote_code, allow_pickle),
        )
        progress("load", 1, 1)
        result = run_scan(loaded, corpus, out=out, resume=resume, progress=progress, **options)
    if out is not None:
        draw(result, out)
    _print(result, json, quiet)
    if not json and not quiet:
        typer.echo(
            f"\nSaved in {out}: tables, run.json, figures/. Print it again: massact show {out}"
            if out
            else "\nNot saved. Keep tables and figures with --out DIR."
        )


@app.command()
def explain(
    run: Scanned,
    model: ModelNow = None,
    corpus: CorpusNow = None,
    n_sequences: Annotated[int | None, typer.Option(min=1, help="Sequences, from the start; nothing: all.")] = None,
    all_keys: Annotated[
        bool, typer.Option(help="Also the mass on every key and the entropy: one more call of the attention kernel.")
    ] = True,
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
    from massact.records.results import open_run

    result = open_run(run)
    options = {"n_sequences": n_sequences, "columns": all_keys, "eps": eps, "seed": seed,
               "batch_size": _batch_size(batch_size)}  # fmt: skip
    _quiet_libraries()
    from massact.explanations import ExplainConfig, explain_run
    from massact.reports import draw

    ExplainConfig.of(options)  # before minutes are spent on loading
    with _progress(quiet or json) as progress:
        explanation = explain_run(
            result, model=model, corpus=corpus, device=device, progress=progress,
            load_options=_load_options(trust_remote_code, allow_pickle), options=options,
        )  # fmt: skip
    explanation.save(run)
    draw(explanation, run)
    _print(explanation, json, quiet)
    if not json and not quiet:
        typer.echo(f"\nAdded to {run}: tables, explain.json, figures/. Print it again: massact show {run}")


@app.command()
def intervene(
    run: Scanned,
    model: ModelNow = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Edit: zero, mean, random, shuffle, scale=F, clip=C, value=V. Can be repeated; default: the first 4.",
        ),
    ] = None,
    layer: Annotated[
        str, typer.Option(help="A layer with findings, onset (as the paper), or all that have any.")
    ] = "onset",
    corpus: CorpusNow = None,
    group: Annotated[
        str | None, typer.Option(help="Column of the JSONL file --corpus: effects for each of its labels as well.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks as well, with commas: piqa,winogrande,arc_easy (extra: tasks).")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder of lm-eval task files of one's own; these work offline.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task.")] = None,
    hold_out: Annotated[
        bool, typer.Option(help="Means of the first half of the sequences, effects on the second.")
    ] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 1,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of bootstrap and shuffle.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What happens without them: zero, mean, random and shuffle side by side?"""
    from massact.records.results import open_run

    result = open_run(run)
    options = {"layer": int(layer) if layer.isdecimal() else layer, "hold_out": hold_out, "batch_size": batch_size,
               "seed": seed, "limit": limit, "tasks": tuple(t for t in (tasks or "").split(",") if t),
               "task_folder": None if task_folder is None else str(task_folder)}  # fmt: skip
    options |= {"sets": tuple(sets)} if sets else {}
    _quiet_libraries()
    from massact.interventions import InterveneConfig, intervene_run
    from massact.reports import draw

    InterveneConfig.of(options)  # before minutes are spent on loading
    with _progress(quiet or json) as progress:
        done = intervene_run(
            result, model=model, corpus=corpus, group=group, device=device, progress=progress,
            load_options=_load_options(trust_remote_code, allow_pickle), options=options,
        )  # fmt: skip
    done.save(run)
    draw(done, run)
    _print(done, json, quiet)
    if not json and not quiet:
        typer.echo(f"\nAdded to {run}: effects.parquet, intervene.json, figures/. Print it again: massact show {run}")


@app.command()
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
    options: dict[str, Any] = dict(_pair(text, "--set", "lr=1e-3") for text in sets or ())
    given = {"variant": None if attention == "softmax" else attention, "steps": steps, "seed": seed}
    options |= {name: value for name, value in given.items() if value is not None}
    _quiet_libraries()
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
    with _progress(quiet or json) as progress:
        last: dict[str, Any] = {}
        done = run_train(
            chosen, out, data, resume=resume, on_row=last.update,
            progress=lambda stage, n, total: progress(stage, n, total, _loss_line(last) if stage == "train" else ""),
        )  # fmt: skip
    _print(done, json, quiet)
    if not json and not quiet:
        typer.echo(f"\nSaved in {out}: model/, tables, train.json. Look into it: massact scan {out / 'model'}")


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    json: Json = False,
) -> None:
    """Print a saved run again; needs neither the model nor torch."""
    from massact.records.explanation import open_explanation
    from massact.records.intervention import open_intervention
    from massact.records.results import open_run
    from massact.records.training import open_training

    if os.path.isfile(run / "train.json") and not os.path.isfile(run / "run.json"):
        _print(open_training(run), json, quiet=False)
        return
    result = open_run(run)
    later = {"explanation": open_explanation(run), "intervention": open_intervention(run)}
    added = {name: one for name, one in later.items() if one is not None}
    if json and added:
        from massact.reports import to_json

        more = "".join(f',\n"{name}": {to_json(one)}' for name, one in added.items())
        typer.echo(f"{to_json(result).rstrip()[:-1].rstrip()}{more}}}")
        return
    for one in (result, *added.values()):
        _print(one, json, quiet=False)


def _print(result: Any, json: bool, quiet: bool) -> None:
    from rich.console import Console

    from massact.records.explanation import Explanation
    from massact.records.intervention import Intervention
    from massact.records.training import Trained
    from massact.reports import show as show_result
    from massact.reports import show_explanation, show_intervention, show_training, to_json

    if json:
        typer.echo(to_json(result))
    elif not quiet:
        known = {Explanation: show_explanation, Intervention: show_intervention, Trained: show_training}
        known.get(type(result), show_result)(result, Console())


def _load_options(trust_remote_code: bool, allow_pickle: bool) -> dict[str, Any]:
    asked = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    return {name: True for name, on in asked.items() if on}


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


def _pair(text: str, option: str, example: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise UserError(f"{option} {text!r} is not name=value.", do=f"For example: {option} {example}")
    return name.strip(), value


def _threshold(text: str) -> tuple[str, float]:
    name, sign, value = text.partition("=")
    try:
        if sign and name:
            return name.strip(), float(value)
    except ValueError:
        pass
    raise UserError(f"--threshold {text!r} is not name=value.", do="For example: --threshold magnitude=50")


def _batch_size(text: str) -> int | str:
    if text == "auto":
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise UserError(f"--batch-size {text!r} is neither auto nor a number from 1 on.")


def _check_out(out: Path, resume: bool) -> None:
    """Refuse a directory that cannot be used before minutes are spent on the model."""
    from massact.records.results import claim, read_info
    from massact.records.runinfo import RunInfo

    if resume and os.path.isfile(out / "run.json"):
        read_info(out)
        return
    made = [folder for folder in (out, *out.parents) if not os.path.exists(folder)]
    claim(out, RunInfo("scan"))
    for folder in made:
        folder.rmdir()


@contextmanager
def _progress(off: bool) -> Iterator[Callable[..., None]]:
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


def _quiet_libraries() -> None:
    """Our errors say what went wrong; the libraries' own chatter would bury them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import massact.training  # noqa: F401 (so that models with an attention variant can be read)


def main() -> None:
    """Entry point: every error is one message and an exit status, never a traceback."""
    # The click that typer brings is not always the package of that name: ask typer for its error.
    usage_error = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may hold what no terminal can show
    try:
        status = app(standalone_mode=False)
        if status == 130:  # how typer hands on Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()
        sys.exit(status if isinstance(status, int) else 0)
    except MassactError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("Interrupted. What was finished is kept: go on with the same command and --resume.", 130)
    except usage_error as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if os.environ.get("MASSACT_TRACEBACK"):
            raise
        _fail(
            f"massact failed: {type(error).__name__}: {error}\nThis is a defect of massact, or of a library under it. "
            "Run again with MASSACT_TRACEBACK=1 and report what it prints.",
            1,
        )


def _fail(message: str, status: int) -> None:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
