"""The command line of a verb, made of its inputs and options, and the life of every verb that is called."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from massact.cli.early_checks import check_names, is_model, target_of
from massact.cli.interrupts import told_where_interrupted
from massact.cli.output import print_result
from massact.cli.progress import progress_of
from massact.records.errors import UserError
from massact.verbs import Call, Done, OfScan, Options, Verb
from massact.verbs.inputs import Inputs, ScannedFirst
from massact.verbs.options import kinds_of, told_of
from massact.verbs.verb import named

MORE = "More options"  # of loading and printing, which most verbs have


# ------------------------------------------------------------------------------------------ from options to parameters
def command(verb: Verb) -> Callable[..., None]:
    """A function whose signature typer reads: a parameter for each input and option, help and bounds with it."""
    inputs, options = verb.inputs.model_fields, verb.options.model_fields
    first, last = ({n: f for n, f in inputs.items() if told_of(f)["last"] is last} for last in (False, True))
    shown = first | {n: f for n, f in options.items() if told_of(f)["shown"]} | last
    order = sorted(shown, key=lambda name: (not told_of(shown[name])["argument"], name in Inputs.model_fields))

    def run(context: typer.Context, **given: Any) -> None:
        # By name: the click that typer brings is not always the package of that name.
        typed = {name for name in given if getattr(context.get_parameter_source(name), "name", "") != "DEFAULT"}
        typed |= {name for name in given if told_of(shown[name])["typed"] is not None}
        asked = {name: given[name] for name in typed if given[name] is not None}
        with told_where_interrupted(verb, asked):
            perform(
                verb,
                verb.inputs.of({name: value for name, value in asked.items() if name in inputs}),
                verb.options.of({n: value for n, value in asked.items() if n in options and n not in inputs}),
            )

    parameters = [_parameter(name, shown[name]) for name in order]
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    run.__name__, run.__doc__ = verb.name, verb.asks
    run.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (context, *parameters)}
    return run


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    told, kind = told_of(field), _kind(field.annotation)
    default = None if field.is_required() or not isinstance(field.default, str | int | float) else field.default
    default = told["typed"] if told["typed"] is not None else default
    if (kind is bool and not isinstance(default, bool)) or "\n" in str(default):
        default = None
    if not field.is_required() and (default is None or get_origin(kind) is list):
        kind, default = kind | None, None
    bound = next((x.ge for x in field.metadata if hasattr(x, "ge")), None)
    flags = told["flag"].split(",") if told["flag"] else []
    if not flags and kind is bool and default is False:
        flags = [f"--{name.replace('_', '-')}"]  # without its --no
    make: Any = typer.Argument if told["argument"] else typer.Option
    panel = {"rich_help_panel": MORE} if told["last"] else {}
    info = make(*flags, help=field.description, **({} if bound is None else {"min": bound}), **panel)
    usual = inspect.Parameter.empty if field.is_required() else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info], default=usual)


def _kind(annotation: Any) -> Any:
    """The type that a text of the command line is read as; what is more than that the option itself reads."""
    kinds = [kind for kind in kinds_of(annotation) if kind is not NoneType]
    for kind in (bool, str):
        if kind in kinds:
            return kind
    outer = get_origin(kinds[0])
    if outer is tuple:
        return list[get_args(kinds[0])[0]]  # type: ignore[misc]
    return list[str] if outer is dict else kinds[0]


# ------------------------------------------------------------------------------------------ the life of a verb
def perform(verb: Verb, inputs: Any, options: Options) -> None:
    """Run a verb: refuse what cannot be before minutes are spent on it, do it, keep it, print it, draw it.

    Raises:
        MassactError: what went wrong, with an exit status.
    """
    speaks = os.environ.get("RANK", "0") == "0"  # of several processes the first
    json, quiet = inputs.json_ and speaks, inputs.quiet or not speaks
    scan = _scan_of(inputs)
    _quiet_libraries()
    with progress_of(verb.name, quiet or json) as progress:
        keep = partial(_keep, formats=inputs.formats(), style=inputs.style)
        call = Call(verb, inputs, options, progress, _say(quiet or json), keep, scan)
        if getattr(inputs, "listed", False):
            for line in named(verb.lists)(call):
                typer.echo(line)
            return
        check_names(inputs, scan if verb.job else None)  # other verbs may go without the scanned model
        if verb.check:
            named(verb.check)(options)
        done = _on_scan(call) if verb.job else named(verb.run)(call)
    print_result(done.result, json, quiet)
    if done.folder is not None:
        sys.stdout.flush()  # the answer need not wait for its pictures
        keep(done.result, done.folder)
    if not json and not quiet:
        typer.echo(f"\n{done.said}")
    if done.failed is not None:
        raise done.failed


def _scan_of(inputs: Any) -> Any:
    """The scan of the directory that a verb was given; None where it was given a model."""
    from massact.records.kinds.scan import open_run

    if not isinstance(inputs, ScannedFirst) or (target := target_of(inputs)) is None:
        return None
    model = is_model(target) if isinstance(inputs, OfScan) else not os.path.isfile(Path(target) / "run.json")
    if not model:
        scan = open_run(Path(target))
        inputs.refuse_those_of_a_model()
        return scan
    if isinstance(inputs, OfScan) and inputs.model is not None:
        raise UserError(
            f"{target} is a model, and so is {inputs.model}.", do="Give one, or the run directory of a scan first."
        )
    return None


def _on_scan(call: Call) -> Done:
    """A verb that adds to a scan: its model loaded, its text made again, both checked; a model is scanned first."""
    from massact.scans import reopen, scan_first

    inputs, options, target = call.inputs, dict(call.options), target_of(call.inputs)
    given = {"device": inputs.device, "load_options": inputs.load_options(), "progress": call.progress}
    if call.scan is not None:
        out = Path(str(target))
        opened = reopen(call.scan, model=inputs.model, corpus=inputs.corpus, **given)
    else:
        out = inputs.out
        opened = scan_first(target, inputs.corpus, asked=inputs.scan_options(call.options), place=out, **given)
        if out is not None:
            call.keep(opened.scan, out)
        options |= {"n_sequences": None} if "n_sequences" in options else {}  # the scan has no more
    return call.added(opened.run(named(call.verb.job), call.progress, **options), out)


def _keep(result: Any, folder: Path, **options: Any) -> None:
    """Draw the figures of a result into its folder."""
    from massact.reports import draw

    draw(result, folder, **options)


def _say(quiet: bool) -> Callable[[str], None]:
    def say(text: str) -> None:
        from massact.reports.spelling import visible

        if not quiet:
            typer.echo(visible(text), err=True)

    return say


def _quiet_libraries() -> None:
    """Our errors say what went wrong; the libraries' own chatter would bury them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("torchao", "torch.utils._pytree"):  # transformers reads torchao where it is installed
        logging.getLogger(name).setLevel(logging.ERROR)
