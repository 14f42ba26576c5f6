"""Window attention with k first tokens kept (Xiao et al. 2023, StreamingLLM).

A window of the last keys breaks many models as soon as the first tokens fall out of it: heads that have nothing to read
put their attention there. Every query sees `width` keys, k of them the first of the text; the loss is that of the
targets whose query has lost a key, so the same targets for every k, against the model's own attention on all keys.

Positions are those of the text. StreamingLLM counts them anew inside its cache when it generates; here texts are
no longer than the trained context, so that the window is the only thing that changes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from massact.classics.works import Classic, Ground, Outcome, Unavailable, row
from massact.corpora import Corpus
from massact.corpora.packing import token_ids
from massact.interventions.effects import effect_rows, evaluate
from massact.interventions.predictions import task_of
from massact.interventions.window import window
from massact.records.anatomy import AttentionPlace
from massact.records.errors import UserError, WorkError
from massact.records.sites import Site
from massact.stats.heads import HeadOptions, HeadStats, Targets
from massact.trace import InputEdit, Probe, Together, measure
from massact.trace.edits import AnyEdit

KEPT = (0, 1, 2, 4, 8)
SUBSTITUTED = 4  # first tokens that become newlines
WIDEST = 1024  # Xiao 2023, Table 1
NEAR = 0.01  # of the perplexity that is compared with
METRICS = ("perplexity", "nll", "kl", "top1_agreement")


def _streaming(ground: Ground) -> Outcome:
    stack, places = _causal(ground)
    length = _length(ground)
    width = min(WIDEST, length // 4)
    kept = [k for k in KEPT if 2 * k <= width]
    if width < 4:
        raise Unavailable(f"sequences of {length} tokens are too short for a window of a quarter of them.")
    outcome = Outcome()
    outcome.notes.append(
        "positions are those of the text, not counted anew in the cache as StreamingLLM does when it generates: texts "
        f"of {length} tokens, in a context of {ground.model.context or 'unknown length'}."
    )
    site = f"{stack}/*.attention*" if stack else "*.attention*"
    edits: dict[str, AnyEdit] = {str(k): window(width, k, site) for k in kept}
    newline = _newline(ground, width, kept, site)
    if isinstance(newline, str):
        outcome.notes.append(f"the first {SUBSTITUTED} tokens were not replaced by newlines: {newline}.")
    else:
        edits["newline"] = newline
    known, n = _evaluated(ground, edits, width, outcome, stack)
    dense = next(iter(known.values()))[0]
    perplexity = {key: edited for key, (_, edited) in known.items()}
    outcome.rows = [row("perplexity", dense, n, stack=stack, subject="dense")]
    outcome.rows += [row("perplexity", p, n, stack=stack, subject=_subject(key)) for key, p in perplexity.items()]
    first = _attention_first(ground, places, outcome)
    left_out = [k for k in KEPT if k not in kept]
    if left_out:
        outcome.notes.append(f"k = {', '.join(map(str, left_out))} left out: more than half of a window of {width}.")
    _notes_on_layers(ground, stack, outcome)
    by_k = {key: p for key, p in perplexity.items() if key != "newline"}
    outcome.numbers[stack] = {
        "width": width, "seq_len": length, "n_targets": n, "dense": dense, "by_k": by_k,
        "newline": perplexity.get("newline"), "smallest_k_near_dense": _smallest(by_k, dense),
        "smallest_k_near_best": _smallest(_below_largest(by_k), min(by_k.values())),
        "attention_first": first,
    }  # fmt: skip
    return outcome


def _evaluated(
    ground: Ground, edits: dict[str, AnyEdit], width: int, outcome: Outcome, stack: str
) -> tuple[dict[str, tuple[float, float]], int]:
    """Perplexity on all keys and under every edit, and the targets that count; effects go into the outcome.

    Raises:
        Unavailable: no edit changes anything, the model has no logits, or no text is long enough.
    """
    corpus = _flush_left(ground.corpus)

    def run(chosen: dict[str, AnyEdit]) -> tuple[dict[str, tuple[float, float]], int]:
        # A query predicts the next token: the first one that has lost a key predicts the target at width + 1.
        paired = evaluate(ground.model, corpus, list(chosen.values()), batch_size=ground.batch_size, since=width + 1)
        effects = effect_rows(paired, stack=stack, only=METRICS)
        outcome.effects += effects
        names = {edit.name: key for key, edit in chosen.items()}
        given = {names[str(e["edit"])]: (float(e["baseline"]), float(e["edited"]))  # type: ignore[arg-type]
                 for e in effects if e["metric"] == "perplexity"}  # fmt: skip
        return given, int(paired.n_targets.sum())

    known: dict[str, tuple[float, float]] = {}
    refused: list[str] = []
    n, reason = 0, ""
    try:
        known, n = run(edits)
    except UserError as error:
        raise Unavailable(f"{error.what} {error.why}".strip()) from error
    except WorkError:  # one of them changed nothing: which?
        for key, edit in edits.items():
            try:
                given, n = run({key: edit})
                known |= given
            except WorkError as error:
                refused.append(key)
                reason = error.what
    if not known:
        raise Unavailable(reason or f"no text has two targets behind a window of {width} tokens.")
    if refused:
        dense = next(iter(known.values()))[0]
        known = {key: known.get(key, (dense, dense)) for key in edits}
        outcome.notes.append(f"nothing at all changes with {', '.join(map(_subject, refused))}: {reason}")
    return known, n


def _flush_left(corpus: Corpus) -> Corpus:
    """The same texts without padding before them, so that position 0 is the first of the text."""
    if corpus.mask is None or bool(corpus.mask[:, 0].all()):
        return corpus
    T = corpus.mask.shape[1]
    at_NT = (torch.arange(T) + corpus.mask.long().argmax(1, keepdim=True)) % T
    moved = {name: x.gather(1, at_NT) if x.shape == at_NT.shape else x for name, x in corpus.inputs.items()}
    return replace(corpus, inputs=moved, mask=corpus.mask.gather(1, at_NT))


def _subject(key: str) -> str:
    return f"{SUBSTITUTED} newlines" if key == "newline" else f"k={key}"


def _below_largest(by_k: dict[str, float]) -> dict[str, float]:
    """All but the largest k: of that nothing says whether more would be better, and alone it is near the best."""
    return {k: p for k, p in by_k.items() if int(k) < max(map(int, by_k))}


def _smallest(by_k: dict[str, float], wanted: float) -> int | None:
    """Least k whose perplexity is at most 1 % above another one."""
    near = [int(k) for k, p in by_k.items() if p <= (1 + NEAR) * wanted]
    return min(near, default=None)


def _causal(ground: Ground) -> tuple[str, dict[Site, AttentionPlace]]:
    """The stack that predicts the next token, and its attention calls.

    Raises:
        Unavailable: the model is no causal decoder, or its attention is not seen.
    """
    if ground.corpus.kind != "tokens":
        raise Unavailable("a window slides over text, and this corpus has no tokens.")
    task = task_of(ground.model)
    if task.ahead != 1:
        kind = "it has an encoder beside its decoder" if task.ahead == 0 else "it does not predict the next token"
        raise Unavailable(f"the model is not a causal decoder: {kind}.")
    stacks = ground.stacks()
    if len(stacks) != 1:
        raise Unavailable(f"the text runs through {len(stacks)} stacks, not through one causal decoder.")
    known = ground.model.anatomy.select_attention("*.attention*")
    places = {site: place for site, place in known.items() if site.stack == stacks[0]}
    if not places:
        reasons = [why for site, why in ground.model.anatomy.no_attention.items() if site.stack == stacks[0]]
        raise Unavailable(f"no attention is seen in it: {reasons[0] if reasons else 'it has none'}.")
    backward = [str(site) for site, place in places.items() if not place.forward]
    if backward:
        raise Unavailable(f"the model is not a causal decoder: queries of {backward[0]} see the keys behind them.")
    return stacks[0], places


def _length(ground: Ground) -> int:
    """Tokens of a sequence; their median where they differ."""
    corpus = ground.corpus
    if corpus.mask is None:
        return int(corpus.inputs["input_ids"].shape[1])
    return int(np.median(corpus.mask.sum(1).numpy()))


def _newline(ground: Ground, width: int, kept: list[int], site: str) -> Together | str:
    """The window with the first tokens replaced by newlines, or why there is none."""
    if SUBSTITUTED not in kept:
        return f"a window of {width} does not keep so many"
    tokenizer = ground.model.tokenizer
    if tokenizer is None:
        return "the model came without a tokenizer"
    ids = token_ids(tokenizer, "\n")
    # Some tokenizers put a mark of a word's beginning before it.
    if not ids or "\n" not in tokenizer.decode(ids[-1:]):
        return "the tokenizer has no token for a newline"

    def apply(inputs: dict[str, Any]) -> dict[str, Any]:
        tokens = inputs.get("input_ids")
        if not isinstance(tokens, Tensor):
            return inputs
        tokens = tokens.clone()
        tokens[:, :SUBSTITUTED] = ids[-1]
        return inputs | {"input_ids": tokens}

    name = f"window {width}, {SUBSTITUTED} newlines in place of the first tokens kept"
    return Together(name, (InputEdit("newlines", apply), window(width, SUBSTITUTED, site)))


def _attention_first(ground: Ground, places: dict[Site, AttentionPlace], outcome: Outcome) -> dict[str, float | None]:
    """Attention mass on position 0 without an edit, as rows; its means over the first two layers and the others."""
    options = HeadOptions(columns=False, bias=False)
    probes = [Probe("first", str(site), lambda: HeadStats(Targets({}, {}, {}), options)) for site in places]
    measured = measure(ground.model, ground.corpus, probes)
    means: dict[bool, list[float]] = {False: [], True: []}
    for site in places:
        mass_NH = measured.result("first", site).per_head["mass_first"]
        mass_NH = mass_NH[~np.isnan(mass_NH).any(1)]
        if not len(mass_NH):
            continue
        line = partial(row, "attention_first", n=len(mass_NH), stack=site.stack, site=site.point, layer=site.layer)
        outcome.rows.append(line(mass_NH.mean()))
        outcome.rows += [line(mass, head=head) for head, mass in enumerate(mass_NH.mean(0))]
        means[site.layer > 2].append(float(mass_NH.mean()))
    return {name: float(np.mean(means[late])) if means[late] else None
            for name, late in (("layers_1_2", False), ("layers_from_3", True))}  # fmt: skip


def _notes_on_layers(ground: Ground, stack: str, outcome: Outcome) -> None:
    without = [site.layer for site in ground.model.anatomy.no_attention if site.stack == stack]
    if without:
        outcome.notes.append(f"no window over the layers {without[:4]} ({len(without)} in all): no attention is seen.")


STREAMING = Classic(
    "streaming", "Xiao et al. 2023", "Does window attention break unless the first tokens are kept?", _streaming
)
