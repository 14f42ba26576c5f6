"""`massact intervene`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator

from massact.records.errors import UserError
from massact.records.verdicts import MARGIN
from massact.verbs.explain import ALL_KEYS
from massact.verbs.inputs import OfScan
from massact.verbs.options import Names, Options, option
from massact.verbs.verb import Verb


def _layers(value: Any) -> Any:
    """One layer, several with commas, or a word for them."""
    if not isinstance(value, str):
        return value
    parts = value.split(",")
    if all(part.strip().isdecimal() for part in parts):
        return int(parts[0]) if len(parts) == 1 else tuple(int(part) for part in parts)
    if value in ("onset", "all"):
        return value
    raise UserError(f"--layer {value!r} is no layer.", do="Give a number, several (3,5), onset or all.")


class InterveneConfig(Options):
    """The options of an intervention.

    Cuts, means and the shuffle's values are of the first half of the sequences where `hold_out`, and effects of the
    second, where there are at least eight.
    """

    VERB: ClassVar[str] = "intervene"

    sets: tuple[str, ...] = option(
        ("zero", "mean", "random", "shuffle"),
        "Edit: zero, mean, random, shuffle (these four by default), scale=F, clip=C, value=V, dims, cut-first, "
        "drop-first, norm-dims, weight=NAME[R,C], ... see docs/reference.md. Can be repeated.",
        "--set",
    )
    layer: Annotated[int | str | tuple[int, ...], BeforeValidator(_layers)] = option(
        "onset", "Onset of the largest cluster; a layer (all its findings), several (3,5), or all of these clusters."
    )
    cluster: str | None = option(
        None,
        "Only this one, as 507@start, at its own onset; each: also every other that passes, one by one; nothing: the "
        "largest, with those of its label at that layer.",
    )
    stack: str | None = option(
        None,
        "Of several stacks, which (see the column stack of findings); of several streams that one alone. Nothing: the "
        "one with most findings; of several streams all of them, as one edit.",
    )
    exact: bool = option(False, "Only the entries that the scan found, not all of half their size or more.")
    hold_out: bool = option(True, "Means of the first half of the sequences, effects on the second, from eight on.")
    sinks: bool = option(True, "Also what sinks do.", shown=False)
    all_keys: bool = option(True, ALL_KEYS)
    repetition: bool = option(
        True, "Also 8 greedy samples of 32 tokens with each edit: how often they repeat themselves."
    )
    tasks: Names = option((), "lm-eval tasks as well, with commas: piqa,winogrande,arc_easy (extra: tasks).")
    task_folder: str | None = option(None, "Folder of lm-eval task files of one's own; these work offline.")
    limit: int | None = option(None, "Questions of each task.", least=1)
    batch_size: int = option(1, "Sequences per forward pass.", least=1)
    margin: float = option(
        MARGIN, "Harm within which an edit is harmless: nats of the log-perplexity, or share of answers.", least=0
    )
    seed: int = option(0, "Seed of the shuffle.")


class Heads(Options):
    """How images are classified where a model has no head, and by which classes."""

    labels: str | None = option(
        None, "Classes of images, for top-1 (Table 4): auto (of the corpus: class folders, CSV), or CSV."
    )
    zero_shot: bool = option(False, "Classify images by the names of their classes (CLIP, SigLIP).")
    classes: Path | None = option(
        None, "Of --zero-shot: class names by number, one a line; nothing: those of the labels."
    )
    prompts: Path | None = option(
        None, "Of --zero-shot: prompts with {} for the name, one a line; nothing: five of ours."
    )
    head: Path | None = option(
        None,
        "Linear head for a model of images without one (.safetensors, .pt): on [CLS], or on [CLS] and the mean of the "
        "patches, as its width says.",
    )


class OnScan(Heads, OfScan):
    """What an intervention is given."""

    evaluate_on: str | None = option(
        None, "Another text for the effects (as --corpus of scan); means stay those of the scanned one."
    )
    n_sequences: int | None = option(None, "Sequences to scan, for a model.", least=1)
    group: str | None = option(
        None, "Column of the JSONL file --evaluate-on (or --corpus): effects for each of its labels too."
    )

    def refuse_those_of_a_model(self) -> None:
        """Refuse, of a run, what only a model can be given."""
        super().refuse_those_of_a_model()
        if self.n_sequences is not None:
            raise UserError("--n-sequences is for a model, not for a run.", do="Leave it out.")

    def scan_options(self, options: Any) -> dict[str, Any]:
        """Of the scan that comes first."""
        return super().scan_options(options) | {"n_sequences": self.n_sequences}


VERB = Verb(
    "intervene",
    "What happens without them: zero, mean, random and shuffle side by side?",
    OnScan,
    InterveneConfig,
    run="massact.interventions.verb:run",
    check="massact.interventions.job:check_edits",
    place=3,
)
