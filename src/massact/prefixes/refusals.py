"""What cannot be folded exactly, with the reason and what can be had in its place."""

from __future__ import annotations

from massact.corpora import Corpus
from massact.interventions.predictions import task_of
from massact.models import Model
from massact.models.wrappers import no_plain_weights
from massact.records.clusters import MASSIVE, passing
from massact.records.errors import UserError
from massact.records.kinds.scan import ScanResult
from massact.records.sites import spanned
from massact.variants.changes import changes_of
from massact.variants.registry import variants

MOST_SLOTS = 4
FALLBACK = (
    "What can be had in its place: the ids of the prefix in front of every prompt, or its keys and values in a cache "
    "(past_key_values) that every prompt goes on from."
)


def refused(title: str, why: str, do: str = FALLBACK) -> UserError:
    """The error of a model that cannot be folded."""
    return UserError(f"{title} cannot be folded.", why, do)


def title_of(model: Model) -> str:
    """How an error calls a model."""
    return model.name or type(model.module).__name__


def check_foldable(model: Model, corpus: Corpus) -> None:
    """Refuse a model whose first tokens do not reach the others by keys and values alone.

    Args:
        model: with its attention, see `massact.models.with_attention`.
        corpus: what was scanned.

    Raises:
        UserError: says why, and what can be had in its place.
    """
    title = title_of(model)
    if (around := no_plain_weights(model.module)) is not None:
        raise refused(title, *around)
    if corpus.kind != "tokens" or set(corpus.inputs) != {"input_ids"}:
        raise refused(title, "A prefix stands in front of text, and this corpus is not text alone.", "")
    already = [name for name in changes_of(model.module) if name in variants()]
    if already:
        raise refused(title, f"It has the attention variant {already[0]!r} already.",
                      "Fold the model that it was made of.")  # fmt: skip
    if getattr(getattr(model.module, "config", None), "is_encoder_decoder", False):
        raise refused(title, "It has an encoder, whose first token sees all others and is not the same in every text.")
    if len(model.anatomy.stacks) != 1:
        raise refused(title, f"Its text runs through {len(model.anatomy.stacks)} stacks, not through one decoder.")
    if task_of(model).ahead != 1:
        why = "It does not predict the next token: its first token sees all others and is not the same in every text."
        raise refused(title, why, "Registers do it in such a model: massact.interventions.test_time_registers.")
    _check_attention(model, title)


def _check_attention(model: Model, title: str) -> None:
    """Refuse blocks whose tokens meet elsewhere than at keys and values that are seen."""
    for stack in model.anatomy.stacks:
        for kinds, layers in stack.other_mixers().items():
            raise refused(title, f"In {spanned(layers)} tokens are mixed by {kinds} too: what the prefix leaves in a "
                          "state is no key and no value.")  # fmt: skip
    for site, why in model.anatomy.no_attention.items():
        raise refused(title, f"In layer {site.layer} tokens meet in no attention that is seen ({why}): what the prefix "
                      "leaves there is no key and no value.")  # fmt: skip
    for site, place in model.anatomy.attentions.items():
        if not place.forward or place.cross:
            raise refused(title, f"Queries of {site} see keys behind them: the first token is not the same in every "
                          "text.")  # fmt: skip
        if place.via != "softmax" and not place.binary:
            raise refused(title, f"{site} adds a bias of the distance to its logits (ALiBi, relative positions): the "
                          "logit of a slot would have to change from query to query.")  # fmt: skip
        if place.via == "softmax":
            raise refused(title, f"{site} is written out in the model and shows no keys.")


def check_massive(scan: ScanResult) -> None:
    """Refuse a scan in which no token has a massive activation.

    Raises:
        UserError: nothing was found, or outlier features alone.
    """
    having = passing(scan.clusters)
    if not len(scan.findings):
        raise UserError("There is nothing to fold.", "The scan has no findings: no token is massive.",
                        "Scan a text in which one is, or quantise the model as it is.")  # fmt: skip
    if len(having) and not (having["label"] == MASSIVE).any() and (having["dim"] >= 0).all():
        raise UserError(
            "There is nothing to fold.",
            "All clusters of the scan are outlier features or humps: of many tokens, which a slot cannot take over.",
            "Rotation or per-channel scales are for those.",
        )


def check_ids(ids: tuple[int, ...], model: Model) -> None:
    """Refuse ids that the model does not know, or too many of them.

    Raises:
        UserError: says which.
    """
    if not 1 <= len(ids) <= MOST_SLOTS:
        raise UserError(f"A prefix of {len(ids)} tokens was asked for.", f"There is room for 1 to {MOST_SLOTS}.",
                        "Give fewer ids; one is often enough.")  # fmt: skip
    known = model.vocabulary or 0
    for token in ids:
        if not 0 <= token < known:
            raise UserError(f"The token id {token} is outside the vocabulary.", f"The model knows 0 to {known - 1}.",
                            "Give ids of its tokenizer.")  # fmt: skip
