"""`massact quantise`: its options."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BeforeValidator

from massact.records.verdicts import MARGIN
from massact.verbs.fold import prefix_in
from massact.verbs.inputs import OfScanOrModel
from massact.verbs.options import Names, Options, option
from massact.verbs.verb import Verb

SCHEMES = (
    "Schemes, with commas: PART[/PART...][+REMEDY...], PART = [TARGET:]FORMAT[-SHARING][-static], as "
    "int8-tensor+hadamard+exempt, kv:int4-token, weights:int4-group64, mlp_act:fp8-token, or a preset (W8A8, NVFP4). "
    "Can "
    "be repeated; default: the table of docs/verbs/quantise.md."
)


class QuantiseConfig(Options):
    """The options of a quantisation.

    Static scales, constant vectors and the order of guilty sites are of the first half of the sequences where
    `hold_out`, and losses of the second, where there are at least eight.
    """

    VERB: ClassVar[str] = "quantise"

    schemes: Names = option((), SCHEMES)
    sites: Names = option(
        (), "Only these sites of activations, with commas: attn_in,o_in,mlp_in,mlp_act (ssm_in, linear_attn_in, ...)."
    )
    stack: str | None = option(
        None, "Of several stacks, which (see the column stack of findings); nothing: that of the largest cluster."
    )
    guilty: str | None = option(
        None, "Scheme whose guilty sites are looked for; nothing: of those by tensor the worst; none: no curve."
    )
    export: str | None = option(
        None,
        "Scheme whose recipes are written; nothing: a harmless one with weights, the least effort; none: no files.",
    )
    goal: float = option(MARGIN, "Loss in nats that the curve of guilty sites stops at.", least=0)
    prefix: Annotated[str | tuple[int, ...] | None, BeforeValidator(prefix_in)] = option(
        None,
        "Of schemes with slots: ids that massact fold has found, or auto (searched for, which takes minutes); "
        "nothing: such schemes are left out of the default table, and searched for where they are asked for.",
    )
    local_sequences: int = option(1, "Sequences that local errors are of.", "--local-sequences", least=1)
    hold_out: bool = option(True, "Scales of the first half of the sequences, losses of the second, from eight on.")
    n_sequences: int | None = option(None, "Sequences, from the start; nothing: all.", least=1)
    batch_size: int = option(1, "Sequences per forward pass.", least=1)
    tasks: Names = option((), "lm-eval tasks as well, with commas: piqa,winogrande,arc_easy (extra: tasks).")
    task_folder: str | None = option(None, "Folder of lm-eval task files of one's own; these work offline.")
    limit: int | None = option(None, "Questions of each task.", least=1)
    margin: float = option(MARGIN, "Harm within which a scheme is harmless, in nats of the log-perplexity.", least=0)
    seed: int = option(0, "Seed of the Hadamard matrices.")


VERB = Verb(
    "quantise",
    "What do massive activations cost in low precision, where, and what helps?",
    OfScanOrModel,
    QuantiseConfig,
    job="massact.quantisation:quantise",
    check="massact.quantisation.job:check",
    place=4,
)
