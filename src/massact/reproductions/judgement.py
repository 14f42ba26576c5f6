"""What was published of which model, with how that is known; and whether a number here agrees.

Tags: confirmed (read in the paper's code, its assets, by several readers, or from its author), replicated (measured by
others on the same model: no number of the paper), memory (recollection of the paper: check before quoting), derived.
The tolerances are ours: published values are of another text and precision, and of massive activations those move the
values by a few per cent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from massact.records.errors import UserError, near
from massact.records.kinds.reproduction import AGREES, DIFFERS, NOT_RUN, NOTHING, UNPUBLISHED
from massact.reproductions.entries import Row
from massact.reproductions.register_values import SIZES

CODE, OWEN = "code of Sun 2024", "Owen 2025, result files"
ANY = "*"


@dataclass(frozen=True)
class Known:
    """A model of which something was published.

    Args:
        model_types: of its configuration; "" for one that is no model of transformers (timm).
        n_layers, d_model: of the stack with its massive activations.
        ids: last parts of the ids under which it is known, in small letters.
    """

    name: str
    model_types: tuple[str, ...]
    n_layers: int
    d_model: int
    ids: tuple[str, ...]


_DINO = {"S": "small", "B": "base", "L": "large", "G": "giant"}
KNOWN: dict[str, Known] = {
    k.name: k
    for k in (
        Known("LLaMA2-7B", ("llama",), 32, 4096, ("llama-2-7b-hf", "llama-2-7b")),
        Known("LLaMA2-7B-chat", ("llama",), 32, 4096, ("llama-2-7b-chat-hf", "llama-2-7b-chat")),
        Known("LLaMA2-13B", ("llama",), 40, 5120, ("llama-2-13b-hf", "llama-2-13b")),
        Known("LLaMA2-13B-chat", ("llama",), 40, 5120, ("llama-2-13b-chat-hf", "llama-2-13b-chat")),
        Known("Mixtral-8x7B", ("mixtral",), 32, 4096, ("mixtral-8x7b-v0.1",)),
        Known("Mistral-7B", ("mistral",), 32, 4096, ("mistral-7b-v0.1",)),
        Known("Mistral-7B-v0.3", ("mistral",), 32, 4096, ("mistral-7b-v0.3",)),
        Known("LLaMA3-8B", ("llama",), 32, 4096, ("meta-llama-3-8b",)),
        Known("Llama-3.2-1B", ("llama",), 16, 2048, ("llama-3.2-1b",)),
        Known("Phi-2", ("phi",), 32, 2560, ("phi-2",)),
        Known("OPT-6.7B", ("opt",), 32, 4096, ("opt-6.7b",)),
        Known("Falcon-7B", ("falcon",), 32, 4544, ("falcon-7b",)),
        Known("GPT-2", ("gpt2",), 12, 768, ("gpt2",)),
        Known("CLIP ViT-L", ("clip", "clip_vision_model", ""), 24, 1024,
              ("clip-vit-large-patch14", "vit_large_patch14_clip_224.openai")),
        *(Known(f"DINOv2-reg ViT-{size}", ("dinov2_with_registers", ""), *SIZES[size],
                (f"dinov2-with-registers-{_DINO[size]}", f"dinov2-with-registers-{_DINO[size]}-imagenet1k-1-layer",
                 f"vit_{_DINO[size]}_patch14_reg4_dinov2.lvd142m")) for size in SIZES),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """One published value.

    Args:
        model: name in `KNOWN`, or ANY.
        experiment, quantity: of the row that it is compared with.
        value: NaN where it is a text.
        text: words of which ours must be one; of dims ("1415, 2533") ours must be these, but for `maybe`.
        layer, place: of that row; None: any (of several rows the first).
        least: ours must be at least the value ("inf" in the paper depends on precision).
        tolerance: relative; of a value of 0 absolute.
        tag, source: how it is known.
        seq_len: tokens of a sequence that it holds for; None: any.
        needs: the option without which there is no such row.
    """

    model: str
    experiment: str
    quantity: str
    value: float = math.nan
    text: tuple[str, ...] = ()
    layer: int | None = None
    place: str | None = None
    least: bool = False
    tolerance: float = 0.1
    tag: str = "memory"
    source: str = ""
    seq_len: int | None = None
    needs: str = ""
    maybe: str = ""

    def told(self) -> str:
        """The value where it is a word or a bound; empty for a plain number."""
        return " or ".join(self.text) if self.text else f"at least {self.value:g}" if self.least else ""


def known_as(model: Mapping[str, Any], asked: str | None = None) -> dict[str, Any]:
    """As which model published values count for a run: by its name and its shape, both exactly.

    The shape alone does not do: LLaMA-1 and every fine-tuned model have that of LLaMA2. Who knows better says so.

    Args:
        model: of run.json.
        asked: name in `KNOWN` that the user gave.

    Returns:
        {"name", "by"}, or {"unavailable": reason, "shape_of": names}.

    Raises:
        UserError: there is no such model, or its shape is another one.
    """
    fits = [k for k in KNOWN.values() if _fits(model, k)]
    last = str(model.get("id") or "").rstrip("/").split("/")[-1].lower()
    if asked is not None:
        if asked not in KNOWN:
            raise UserError(f"There is no published model {asked!r}.", do=near(asked, KNOWN))
        if KNOWN[asked] not in fits:
            raise UserError(f"This is not {asked}: it has another shape.", f"{_shape(model)}; {asked} is "
                            f"{_of(KNOWN[asked])}.", "Leave --as out.")  # fmt: skip
        return {"name": asked, "by": f"the option --as, and its shape ({_of(KNOWN[asked])})"}
    for k in fits:
        if last in k.ids:
            return {"name": k.name, "by": f"its name ({last}) and its shape ({_of(k)})"}
    if fits:
        names = [k.name for k in fits]
        why = f"it has the shape of {', '.join(names)}, but another name ({last}): if it is that model, say so"
        return {"unavailable": f"{why} (--as {names[0]})", "shape_of": names}
    return {"unavailable": f"nothing was published of a model of this shape ({_shape(model)})", "shape_of": []}


def _fits(model: Mapping[str, Any], k: Known) -> bool:
    layers, widths = dict(model.get("n_layers") or {}), dict(model.get("d_model") or {})
    shapes = {(layers[s], widths.get(s)) for s in layers}
    return str(model.get("model_type") or "") in k.model_types and (k.n_layers, k.d_model) in shapes


def _of(k: Known) -> str:
    return f"{k.model_types[0] or 'timm'}, {k.n_layers} layers, {k.d_model} wide"


def _shape(model: Mapping[str, Any]) -> str:
    layers, widths = dict(model.get("n_layers") or {}), dict(model.get("d_model") or {})
    return f"{model.get('model_type') or 'no model type'}, " + ", ".join(
        f"{n} layers, {widths.get(s)} wide" for s, n in layers.items()
    )


# ---------------------------------------------------------------------------- the verdict
def judged(
    rows: Sequence[Row], experiment: str, model: str | None, seq_len: int | None, published: Iterable[Published]
) -> list[Row]:
    """Add to the rows of one experiment what was published of them, and the verdict.

    A published value of which there is no row is a row of its own: not run, where an option is missing, else different.

    Args:
        rows: made by `row`.
        model: name in `KNOWN`, or None.
        seq_len: of the scanned sequences.
        published: values of all models.
    """
    mine = [p for p in published if p.experiment == experiment and p.model in (model, ANY)]
    found: dict[int, Published] = {}
    more: list[Row] = []
    for p in mine:
        places = [i for i, r in enumerate(rows) if _meant(p, r) and i not in found]
        if places:
            found[places[0]] = p
        elif p.needs:
            more.append(_alone(p, NOT_RUN, p.needs))
        elif p.model != ANY and any(_has_value(r) for r in rows):
            more.append(_alone(p, DIFFERS, "there is none here"))
    given = [_with(r, found.get(i), seq_len) for i, r in enumerate(rows)]
    return [{"experiment": experiment} | r for r in (*given, *more)]


def _has_value(r: Row) -> bool:
    return not math.isnan(r["ours"]) or bool(r["ours_text"])


def _meant(p: Published, r: Row) -> bool:
    return r["quantity"] == p.quantity and p.layer in (None, r["layer"]) and p.place in (None, r["place"])


def _columns(p: Published | None) -> Row:
    if p is None:
        return {"published": math.nan, "published_text": "", "tag": "", "source": "", "tolerance": math.nan}
    return {"published": p.value, "published_text": p.told(), "tag": p.tag, "source": p.source,
            "tolerance": math.nan if p.text and math.isnan(p.value) else p.tolerance}  # fmt: skip


def _alone(p: Published, verdict: str, reason: str) -> Row:
    empty = {"stack": "", "layer": -1 if p.layer is None else p.layer, "place": p.place or "", "unit": "",
             "ours": math.nan, "ours_text": "", "headline": verdict == DIFFERS}  # fmt: skip
    return {"quantity": p.quantity} | empty | _columns(p) | {"verdict": verdict, "reason": reason}


def _with(r: Row, p: Published | None, seq_len: int | None) -> Row:
    if p is None or not _has_value(r):
        verdict = UNPUBLISHED if _has_value(r) else NOTHING
        return r | _columns(p) | {"verdict": verdict}
    if p.seq_len is not None and seq_len != p.seq_len:
        here = "sequences of different lengths" if seq_len is None else f"{seq_len:,}"
        why = f"published for sequences of {p.seq_len:,} tokens, not {here}: --seq-len {p.seq_len}"
        return r | _columns(p) | {"verdict": UNPUBLISHED, "reason": "; ".join(x for x in (r["reason"], why) if x)}
    return r | _columns(p) | {"verdict": AGREES if _agrees(r, p) else DIFFERS, "headline": True}


def _agrees(r: Row, p: Published) -> bool:
    if p.text and not _text_agrees(r["ours_text"], p):
        return False
    if math.isnan(p.value):
        return True
    ours = float(r["ours"])
    if p.least:
        return ours >= p.value or math.isnan(ours)  # a perplexity that is no number any more has exploded, too
    return abs(ours - p.value) <= p.tolerance * (abs(p.value) or 1.0)


def _text_agrees(ours: str, p: Published) -> bool:
    if ours in p.text:
        return True
    sets = [_whole_numbers(x) for x in (ours, p.text[0], p.maybe)]
    return None not in sets[:2] and sets[1] <= sets[0] <= sets[1] | (sets[2] or set())  # type: ignore[operator]


def _whole_numbers(text: str) -> set[int] | None:
    parts = [x.strip() for x in text.split(",") if x.strip()]
    return {int(x) for x in parts} if all(x.isdecimal() for x in parts) else None
