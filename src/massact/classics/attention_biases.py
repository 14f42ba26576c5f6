"""Roles of the query, key and value biases of attention (Namazifar et al. 2023).

With q = W_q x + b_q and so on:
    b_k adds q.b_k to all logits of a query, which softmax does not see: redundant, unless something between the bias
        and the product depends on the position (rotary embeddings) or on the key (a norm).
    b_v adds b_v to the output of each head, since the rows of P sum to 1 (not with a learned sink).
    b_q adds b_q.k to the logits of key k: it says which keys all queries prefer.
Which entry of which parameter has which role is found by gradients. Parameters of another name than "bias" (the scale
of a norm of queries or keys, learned sinks) are out of scope.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from massact.classics.works import Classic, Ground, Outcome, Unavailable, row
from massact.interventions.effects import effect_rows, evaluate
from massact.interventions.predictions import logits_of
from massact.models import Model
from massact.records.anatomy import AttentionPlace
from massact.records.errors import UserError
from massact.records.sites import Site
from massact.stats import PerSequence, Where
from massact.stats.attention_call import Attended
from massact.trace import AttentionEdit, Probe, Seen, Together, WeightEdit, edited, observing, unchanged
from massact.trace.bias_roles import ROLES, bias_roles
from massact.trace.edits import AnyEdit

WORDS = {"q": "query", "k": "key", "v": "value"}
METRICS = ("perplexity", "nll", "kl", "top1_agreement")

Masks = dict[str, dict[str, Tensor]]  # role -> parameter -> (N,) bool


@dataclass
class _Found:
    """The biases of one stack: which entries have which role, over all layers and layer by layer."""

    places: dict[Site, AttentionPlace]
    layers: dict[Site, Masks]
    masks: Masks


def _attention_biases(ground: Ground) -> Outcome:
    outcome, reasons = Outcome(), []
    for stack in ground.stacks():
        try:
            found = _find(ground, stack)
        except Unavailable as error:
            reasons.append(f"{stack or 'the model'}: {error.what}" if len(ground.stacks()) > 1 else error.what)
            continue
        outcome.numbers[stack] = _of_stack(ground, stack, found, outcome)
    if not outcome.numbers:
        raise Unavailable(" ".join(reasons) or "the corpus runs through no stack.")
    outcome.notes += reasons
    return outcome


# ---- which entries
def _find(ground: Ground, stack: str) -> _Found:
    """Roles of all bias entries of a stack.

    Raises:
        Unavailable: no attention, no biases, queries and keys not seen, or an entry of two roles.
    """
    model = ground.model
    places = {site: place for site, place in model.anatomy.attentions.items() if site.stack == stack}
    if not places:
        reasons = [why for site, why in model.anatomy.no_attention.items() if site.stack == stack]
        raise Unavailable(f"no attention is seen in it: {reasons[0] if reasons else 'it has none'}.")
    hidden = [str(site) for site, place in places.items() if place.via == "softmax"]
    if hidden:
        raise Unavailable(
            f"attention of {hidden[0]} is written out in the model, so its queries and keys are not seen, and which "
            "biases feed them cannot be told."
        )
    try:
        given = bias_roles(model.module, model.example, list(places.values()), ground.seed)
    except RuntimeError as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise Unavailable(f"no gradients can be taken through it ({first}).") from error
    found = _Found(places, {}, {role: {} for role in ROLES})
    for site, by_name in zip(places, given, strict=True):
        found.layers[site] = {role: {n: m[role] for n, m in by_name.items() if role in m} for role in ROLES}
        for role in ROLES:
            for name, mask in found.layers[site][role].items():
                before = found.masks[role].get(name)
                found.masks[role][name] = mask if before is None else before | mask
    _check(found.masks)
    return found


def _check(masks: Masks) -> None:
    if not any(masks.values()):
        raise Unavailable("no bias inside its attention modules feeds queries, keys or values.")
    for i, role in enumerate(ROLES):
        for other in ROLES[i + 1 :]:
            for name, mask in masks[role].items():
                both = int((mask & masks[other].get(name, torch.zeros_like(mask))).sum())
                if both:
                    raise Unavailable(
                        f"{both} entries of {name} feed the {WORDS[role]} and the {WORDS[other]} at once, so they have "
                        "no role of their own."
                    )


# ---- edits
def _zero(old_N: Tensor, draw: np.random.Generator) -> Tensor:
    return torch.zeros_like(old_N)


def _random(old_N: Tensor, draw: np.random.Generator) -> Tensor:
    """Values of exactly the same mean and standard deviation."""
    x = torch.from_numpy(draw.standard_normal(len(old_N)))
    wanted = old_N.detach().double().cpu()
    x = x - x.mean()
    spread = float(x.std(correction=0))
    x = x / spread * wanted.std(correction=0) if spread > 0 else x
    return (x + wanted.mean()).to(old_N)


KINDS: dict[str, Callable[[Tensor, np.random.Generator], Tensor]] = {"zero": _zero, "random": _random}


def _edit(model: Model, masks: Masks, role: str, kind: str, seed: int) -> Together | None:
    """The biases of one role changed in all layers; None where that changes no entry."""
    parameters = dict(model.module.named_parameters())
    edits = []
    for i, (name, mask) in enumerate(masks[role].items()):
        old = parameters[name].detach()
        at = mask.to(old.device)
        new_N = KINDS[kind](old[at], np.random.default_rng((seed, ROLES.index(role), i)))
        if bool((new_N != old[at]).any()):
            edits.append(WeightEdit(name, name, _putting(at, new_N)))
    return Together(f"{WORDS[role]} biases {kind}", tuple(edits)) if edits else None


def _putting(mask_N: Tensor, new_M: Tensor) -> Callable[[Tensor], Tensor]:
    def apply(weight_N: Tensor) -> Tensor:
        weight_N[mask_N] = new_M
        return weight_N

    return apply


# ---- what they do
def _of_stack(ground: Ground, stack: str, found: _Found, outcome: Outcome) -> dict[str, object]:
    model, where = ground.model, f" of {stack}" if stack else ""
    _entries(model, found, outcome)
    edits: dict[tuple[str, str], Together] = {}
    for role in ROLES:
        made = {kind: _edit(model, found.masks, role, kind, ground.seed) for kind in KINDS} if found.masks[role] else {}
        edits |= {(role, kind): e for kind, e in made.items() if e is not None}
        if not found.masks[role]:
            outcome.notes.append(f"no bias feeds the {WORDS[role]}{where}.")
        elif made["zero"] is None:
            outcome.notes.append(f"all {WORDS[role]} biases{where} are zero: there is nothing to take away.")
    numbers: dict[str, object] = {
        "entries": {role: sum(int(m.sum()) for m in found.masks[role].values()) for role in ROLES},
    }
    reason = _effects(ground, stack, edits, outcome, numbers)
    if reason:
        outcome.notes.append(f"effects of the biases{where} are unavailable: {reason}")
    if ("v", "zero") in edits:
        errors = _identity_errors(model, found.places, edits["v", "zero"])
        for site, (error, n) in errors.items():
            outcome.rows.append(row("value_bias_identity_error", error, n, stack=stack, site=site.point,
                                    layer=site.layer))  # fmt: skip
        numbers["value_bias_identity_error"] = max((e for e, _ in errors.values()), default=None)
        sinks = [str(site) for site in errors if found.places[site].row_sum < 0.999]
        if sinks:
            outcome.notes.append(
                f"value biases{where} are not simply added: rows of attention sum to less than 1 at {sinks[0]} "
                f"({len(sinks)} of {len(errors)} calls), the rest goes to a learned sink."
            )
    return numbers


def _entries(model: Model, found: _Found, outcome: Outcome) -> None:
    """How many entries every layer has of every role, and their norm."""
    parameters = dict(model.module.named_parameters())
    for site, by_role in found.layers.items():
        for role, by_name in by_role.items():
            if not by_name:
                continue
            values = torch.cat([parameters[n].detach()[m.to(parameters[n].device)].float() for n, m in by_name.items()])
            line = partial(row, stack=site.stack, site=site.point, layer=site.layer, subject=role)
            outcome.rows.append(line("bias_entries", len(values), 1))
            outcome.rows.append(line("bias_norm", float(values.norm()), len(values)))


def _effects(
    ground: Ground, stack: str, edits: dict[tuple[str, str], Together], outcome: Outcome, numbers: dict[str, object]
) -> str:
    """Effects on what the model predicts; the reason where there are none."""
    if not edits:
        return "no edit changes an entry."
    try:
        paired = evaluate(ground.model, ground.corpus, list(edits.values()), batch_size=ground.batch_size)
    except UserError as error:
        return error.what
    effects = effect_rows(paired, stack=stack, only=METRICS)
    outcome.effects += effects
    changed, top, n = _logit_changes(ground, edits)
    by_edit: dict[str, dict[str, object]] = {}
    for key, edit in edits.items():
        relative = changed[key] / top if top > 0 else float("nan")
        by_edit[edit.name] = {"max_delta_logit": relative}
        for e in effects:
            if e["edit"] == edit.name:
                of_itself = e["metric"] in ("kl", "top1_agreement")  # 0 and 1 without the edit
                by_edit[edit.name][f"{e['metric']}{'' if of_itself else '_delta'}"] = e[
                    "edited" if of_itself else "delta"
                ]
        outcome.rows.append(row("max_delta_logit", relative, n, stack=stack, subject=edit.name))
    numbers["effects"] = by_edit
    keys = [float(by_edit[e.name]["max_delta_logit"]) for (role, _), e in edits.items() if role == "k"]  # type: ignore[arg-type]
    if keys:
        allowed = torch.finfo(ground.model.dtype).eps ** 0.5
        redundant = max(keys) <= allowed
        numbers |= {"keys_redundant": redundant, "keys_max_delta_logit": max(keys), "keys_allowed": allowed}
        if not redundant:
            outcome.notes.append(
                f"key biases{f' of {stack}' if stack else ''} are not redundant: without them logits move by "
                f"{max(keys):.2g} of the greatest. What they add depends on the position or on the key, as with rotary "
                "embeddings behind the bias, or a norm."
            )
    return ""


def _logit_changes(
    ground: Ground, edits: dict[tuple[str, str], Together]
) -> tuple[dict[tuple[str, str], float], float, int]:
    """Greatest |change of a logit| by each edit, greatest |logit|, and logits looked at: of the first batch."""
    batch = next(iter(ground.corpus.batches(ground.batch_size)))

    def counted() -> Iterator[Tensor]:
        logits = logits_of(ground.model, batch)
        for b, rows in enumerate(batch.rows):
            here = logits[b]
            yield (here if rows is None or logits.ndim < 3 else here[rows]).float()

    with torch.inference_mode():
        base = list(counted())
        changed = {}
        for key, edit in edits.items():
            with edited(ground.model, edit, sequences=batch.sequences):
                pairs = zip(base, counted(), strict=True)
                changed[key] = max(float((new - old).abs().max()) for old, new in pairs)
    return changed, max(float(x.abs().max()) for x in base), sum(x.numel() for x in base)


def _identity_errors(
    model: Model, places: dict[Site, AttentionPlace], without: Together
) -> dict[Site, tuple[float, int]]:
    """Greatest |output without b_v + b_v - output| over max |output| of every call, and outputs looked at.

    On the example input. Every layer sees what it sees in the model: the calls without b_v hand on the outputs with
    it. b_v of a call is the change of its values at the first key.
    """
    sizes: dict[Site, list[tuple[float, float, int]]] = {}

    def as_before(site: Site, kept: list[tuple[Tensor, Tensor]], a: Attended) -> Tensor:
        v_KF, out_HTF = kept.pop(0)
        assert a.v_KSF is not None and a.out_HTF is not None
        added_KF = (v_KF - a.v_KSF[:, 0]).float()
        added_HF = added_KF.repeat_interleave(len(out_HTF) // len(added_KF), 0)
        off = a.out_HTF.float() + added_HF[:, None] - out_HTF.float()
        sizes.setdefault(site, []).append((float(off.abs().max()), float(out_HTF.abs().max()), out_HTF.numel()))
        return out_HTF

    def run(probes: Sequence[Probe], edits: Sequence[AnyEdit]) -> Seen:
        lenient = ("edits", "sites")
        with torch.inference_mode(), unchanged(model.module), observing(model, probes, edits, lenient=lenient) as seen:
            model.module(**model.example)
        return seen

    seen = run([Probe("outputs", str(site), _Outputs) for site in places], ())
    kept = {site: list(rows.values()) for site in places if (rows := seen.result("outputs", site))}
    run((), [without, *(AttentionEdit(str(s), str(s), partial(as_before, s, rows)) for s, rows in kept.items())])
    errors = {}
    for site, found in sizes.items():
        off, top, n = (max(x[0] for x in found), max(x[1] for x in found), sum(x[2] for x in found))
        errors[site] = off / top if top > 0 else float("nan"), n
    return errors


class _Outputs(PerSequence):
    """Values of the first key and the output of attention calls, where both are seen."""

    def update(self, a: Attended, where: Where) -> None:
        """Take the attention call of one sequence."""
        if a.v_KSF is not None and a.out_HTF is not None:
            self.rows[where.sequence] = a.v_KSF[:, 0].clone(), a.out_HTF.clone()


ATTENTION_BIASES = Classic(
    "attention-biases", "Namazifar et al. 2023", "What do the biases of queries, keys and values do?", _attention_biases
)
