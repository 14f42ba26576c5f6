"""What classes of tokens the heads attend to: [CLS], [SEP], marks, the first position, others (Clark et al. 2019).

Shares of attention, the chance level, attention from [SEP] to [SEP], entropies, and whether the loss would notice:
|dL/dP| by class. Masked language models read text in Clark's format; decoders, and models of images, what was scanned.

Metrics of the rows, of the point "attention": per layer and head, subject a class: attention (share of a query's
attention), gradient (mean |dL/dP|), gradient_relative (over the mean of all pairs). Per layer and head: self_attention
(subject sep), entropy, cls_entropy (of the class token's query). Per layer, subject a class: chance, gradient_sum
(means summed over the heads), gradient_sum_relative.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from massact.classics.attention_by_class import ClassShares
from massact.classics.attention_gradients import ClassGradients, class_gradients
from massact.classics.token_labels import CLASSES, OTHER, TokenLabels, ids_in, labels_of, paired_text
from massact.classics.works import Classic, Ground, Outcome, Unavailable, row
from massact.corpora import Corpus
from massact.interventions.predictions import task_of
from massact.records.anatomy import AttentionPlace
from massact.records.errors import UserError
from massact.records.sites import Site
from massact.trace import Probe, measure

MOST_GRADIENT_SEQUENCES = 32  # a backward pass keeps the activations of every layer
HALF = 0.5


@dataclass
class _Found:
    """What was measured, by site."""

    shares: dict[Site, dict[str, Any]]
    gradients: dict[Site, ClassGradients] = field(default_factory=dict)


def _token_classes(ground: Ground) -> Outcome:
    model, stacks = ground.model, ground.stacks()
    places = {
        s: p for s, p in model.anatomy.attentions.items()
        if s.stack in stacks and s.point.startswith("attention") and not p.cross
    }  # fmt: skip
    if not places:
        reasons = list(dict.fromkeys(model.anatomy.no_attention.values()))
        raise Unavailable("No self-attention call of this model can be seen" + (f": {reasons[0]}." if reasons else "."))
    outcome = Outcome(notes=model.anatomy.unseen_attention(stacks))
    corpus, how = _text(ground, outcome)
    tokens = TokenLabels(model.tokenizer if corpus.kind == "tokens" else None)
    if corpus.kind == "tokens" and model.tokenizer is None:
        outcome.notes.append("There is no tokenizer, so only the first position is told from the others.")
    found = _Found(_shares(ground, corpus, places, tokens))
    few = corpus.head(min(corpus.n_sequences, MOST_GRADIENT_SEQUENCES))
    if few.n_sequences < corpus.n_sequences:
        outcome.notes.append(f"Gradients are of the first {few.n_sequences} of {corpus.n_sequences} sequences.")
    try:
        found.gradients = class_gradients(model, few, places, tokens, batch_size=ground.batch_size, seed=ground.seed)
    except (UserError, RuntimeError) as error:  # a model may hold what autograd cannot pass
        reason = getattr(error, "what", None) or str(error).splitlines()[0]
        outcome.notes.append(f"Gradients are unavailable. {reason}")
    if found.gradients and model.dtype == torch.float16:
        outcome.notes.append("Gradients in float16 lose what is below 6e-8: use float32 or bfloat16.")
    for stack in dict.fromkeys(s.stack for s in found.shares):
        mine = sorted((s for s in found.shares if s.stack == stack), key=lambda s: (s.layer, s.point))
        for site in mine:
            _add_rows(outcome, site, found)
        outcome.numbers[stack] = {"format": how, **_numbers(mine, found)}
    if not outcome.numbers:
        raise Unavailable("No sequence is long enough: a causal query needs a position before it.")
    return outcome


def _text(ground: Ground, outcome: Outcome) -> tuple[Corpus, str]:
    """What the model reads here, and its format by name."""
    model, corpus = ground.model, ground.corpus
    masked = corpus.kind == "tokens" and task_of(model).mask_id is not None
    known = [getattr(model.tokenizer, name, None) is not None for name in ("cls_token_id", "sep_token_id")]
    if not masked or not all(known):
        return corpus, "as scanned"
    paired = paired_text(model, corpus)
    if paired is None:
        outcome.notes.append("No sequence is long enough for [CLS] p1 [SEP] p2 [SEP]: the text is as scanned.")
        return corpus, "as scanned"
    if paired.n_sequences < corpus.n_sequences:
        n = corpus.n_sequences - paired.n_sequences
        outcome.notes.append(f"Left out: {n} sequences too short for [CLS] p1 [SEP] p2 [SEP].")
    return paired, "[CLS] p1 [SEP] p2 [SEP]"


def _shares(
    ground: Ground, corpus: Corpus, places: Mapping[Site, AttentionPlace], tokens: TokenLabels
) -> dict[Site, dict[str, Any]]:
    ids_of = ids_in(corpus.inputs)
    labels = {stack: labels_of(ground.model, stack, ids_of, tokens) for stack in {s.stack for s in places}}
    probes = [Probe("classes", str(s), partial(ClassShares, labels[s.stack])) for s in places]
    measured = measure(ground.model, corpus, probes)
    results = {s: measured.result("classes", s) for s in places}
    return {s: r for s, r in results.items() if r}


def _add_rows(outcome: Outcome, site: Site, found: _Found) -> None:
    """Rows of one attention call; classes that no query sees have none."""
    line = partial(row, stack=site.stack, site=site.point, layer=site.layer)
    shares, gradient = found.shares[site], found.gradients.get(site)
    for c, name in enumerate(CLASSES):
        n_H = shares["queries"][:, c]
        if n_H.any():
            outcome.rows.append(line("chance", _mean(shares["chance"][:, c]), int(n_H.max()), subject=name))
            for head, share in enumerate(shares["share"][:, c]):
                outcome.rows.append(line("attention", share, int(n_H[head]), head=head, subject=name))
        if gradient is None or not gradient.pairs_HC[:, c].any():
            continue
        pairs_H = gradient.pairs_HC[:, c].astype(int)
        for metric, x_C in (("gradient_sum", gradient.summed_C), ("gradient_sum_relative", gradient.relative_C)):
            outcome.rows.append(line(metric, x_C[c], int(pairs_H.sum()), subject=name))
        for metric, x_HC in (("gradient", gradient.mean_HC), ("gradient_relative", gradient.relative_HC)):
            for head, value in enumerate(x_HC[:, c]):
                outcome.rows.append(line(metric, value, int(pairs_H[head]), head=head, subject=name))
    for metric, key, count, name in (
        ("self_attention", "self", "n_self", "sep"), ("entropy", "entropy", "n", ""),
        ("cls_entropy", "cls_entropy", "n_cls", "cls"),
    ):  # fmt: skip
        for head, value in enumerate(shares[key]) if shares[count] else ():
            outcome.rows.append(line(metric, value, shares[count], head=head, subject=name))


def _numbers(sites: list[Site], found: _Found) -> dict[str, Any]:
    """One stack in short; what its text does not have is left out."""
    shares_LC = np.stack([_mean_rows(found.shares[s]["share"]) for s in sites])
    chance_LC = np.stack([_mean_rows(found.shares[s]["chance"]) for s in sites])
    numbers: dict[str, Any] = {"layers": len(sites), "attention": {}, "chance": {}, "peak": {}, "layers_over_half": {}}
    for c, name in enumerate(CLASSES):
        if np.isfinite(shares_LC[:, c]).any():
            best = int(np.nanargmax(shares_LC[:, c]))
            numbers["attention"][name], numbers["chance"][name] = _mean(shares_LC[:, c]), _mean(chance_LC[:, c])
            numbers["peak"][name] = {"layer": sites[best].layer, "attention": float(shares_LC[best, c])}
            numbers["layers_over_half"][name] = [
                s.layer for s, share in zip(sites, shares_LC[:, c], strict=True) if share > HALF
            ]
    numbers["classes_not_seen"] = [name for name in CLASSES if name not in numbers["attention"]]
    if any(found.shares[s]["n_self"] for s in sites):
        self_L = np.array([_mean(found.shares[s]["self"]) for s in sites])
        best = int(np.nanargmax(self_L))
        numbers["sep_to_sep"] = {"mean": _mean(self_L), "peak": float(self_L[best]), "peak_layer": sites[best].layer}
    entropy = {(s.layer, h): float(x) for s in sites for h, x in enumerate(found.shares[s]["entropy"])}
    for name, choose in (("broadest", max), ("narrowest", min)):
        layer, head = choose(entropy, key=lambda at: entropy[at])
        numbers[f"entropy_{name}"] = {"nats": entropy[layer, head], "layer": layer, "head": head}
    if found.shares[sites[-1]]["n_cls"]:
        numbers["cls_entropy_last_layer"] = _mean(found.shares[sites[-1]]["cls_entropy"])
    if any(s in found.gradients for s in sites):
        numbers["gradient_over_other"] = _gradient_ratios([found.gradients[s] for s in sites if s in found.gradients])
    return numbers


def _gradient_ratios(layers: list[ClassGradients]) -> dict[str, dict[str, float]]:
    """Class -> |dL/dP| (summed over heads) over that of class "other", mean over the first and the second half."""
    summed_LC = np.stack([g.summed_C for g in layers])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_LC = summed_LC / summed_LC[:, OTHER, None]
    middle = (len(layers) + 1) // 2
    return {
        name: {"early": _mean(ratio_LC[:middle, c]), "late": _mean(ratio_LC[middle:, c])}
        for c, name in enumerate(CLASSES) if c != OTHER and np.isfinite(ratio_LC[:, c]).any()
    }  # fmt: skip


def _mean(x: np.ndarray) -> float:
    """Mean of what is known; NaN where nothing is."""
    known = x[np.isfinite(x)]
    return float(known.mean()) if len(known) else float("nan")


def _mean_rows(x_HC: np.ndarray) -> np.ndarray:
    return np.array([_mean(x_HC[:, c]) for c in range(x_HC.shape[1])])


TOKEN_CLASSES = Classic(
    "token-classes", "Clark et al. 2019", "Which classes of tokens do heads attend to, and does the loss notice?",
    _token_classes,
)  # fmt: skip
