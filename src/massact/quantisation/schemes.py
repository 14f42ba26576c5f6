"""Schemes: what is quantised, in which format, and what is done about massive activations; read from a short name.

SCHEME = PART[/PART...][+REMEDY...]          int8-tensor+exempt, weights:int8-channel/act:int8-token, W8A8
PART   = [TARGET:]FORMAT[-SHARING][-static]  mlp_act:int8-tensor, kv:int4-token, nvfp4, int4-group32, fp8-none
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from massact.quantisation.number_formats import MICROSCALED, SHARINGS, Format, of_arguments, preset
from massact.records.errors import UserError, near

OTHERS = ("ssm_in", "linear_attn_in", "conv_in", "mixer_in")  # of blocks that mix tokens otherwise than by attention
SITES = ("attn_in", *OTHERS, "o_in", "mlp_in", "mlp_act")  # what the Linear modules of a block read
CACHED = ("k", "v")
SMOOTHED = ("attn_in", *OTHERS, "mlp_in")  # where SmoothQuant can put its scales into the norm before
TARGETS = {"act": SITES, "kv": CACHED, "weights": ("weights",)} | {s: (s,) for s in (*SITES, *CACHED)}
STRENGTH = 0.5  # of SmoothQuant, as published

REMEDIES = {
    "exempt": "massive tokens pass as they are and are left out of every scale (a cached prefix, IntactKV)",
    "hadamard": "rotated by a random Hadamard matrix before, and back behind (QuaRot, SpinQuant)",
    "smooth": "SmoothQuant at attn_in and mlp_in (ssm_in, ...), smooth=0.8 with another strength",
    "smooth-all": "the same at all sites of activations",
    "insert": "massive tokens are one constant vector for each cluster, kept as it is (clamp and insert)",
    "slots": "on the model with its massive activation folded into slots (see fold), against its own loss",
    "super": "weights: the largest products of massive tokens are left out of scales and kept as they are (Yu 2024)",
}
DEFAULT = (
    "int8-tensor", "int8-tensor+exempt", "int8-tensor+hadamard", "int8-tensor+hadamard+exempt", "int8-tensor+slots",
    "int8-tensor+hadamard+slots", "int8-tensor+smooth-all", "int8-tensor+insert", "int8-tensor-static", "int8-token",
    "int8-token+exempt", "fp8-tensor", "fp8-tensor+exempt", "fp8-none", "int4-group32", "nvfp4", "nvfp4+exempt",
    "mxfp4", "kv:int4-token", "kv:int4-token+exempt", "k:int4-channel/v:int4-token",
    "k:int4-channel/v:int4-token+exempt", "W8A8",
)  # fmt: skip

_PART = re.compile(
    r"(?:(?P<target>[a-z_]+):)?(?P<format>int[2-8]|fp8|mxfp4|nvfp4)"
    r"(?:-(?P<sharing>[a-z]+)(?P<group>[0-9]*))?(?P<static>-static)?"
)


@dataclass(frozen=True)
class Part:
    """What is quantised, and how.

    Args:
        target: one of `SITES`, k, v, or weights.
        form: the number format.
    """

    target: str
    form: Format


@dataclass(frozen=True)
class Scheme:
    """A way to run a model in low precision, and what is done about its massive activations.

    Args:
        name: as it was given.
        parts: what is quantised, one for each target.
        exempt: massive tokens pass as they are, and count in no scale.
        rotated: see `REMEDIES`; smooth: strength of SmoothQuant at `smooth_sites`; None: none.
        insert, slots, super_weights: see `REMEDIES`.
        skipped: (layer, site) that stay in full precision.
    """

    name: str
    parts: tuple[Part, ...]
    exempt: bool = False
    rotated: bool = False
    smooth: float | None = None
    smooth_sites: tuple[str, ...] = SMOOTHED
    insert: bool = False
    slots: bool = False
    super_weights: bool = False
    skipped: frozenset[tuple[int, str]] = frozenset()

    @property
    def effort(self) -> int:
        """What its remedies ask for: 1 for a prefix or scales in weights, 2 for rotations or constants at run time."""
        light = (self.exempt, self.slots, self.smooth is not None, self.super_weights)
        return sum(light) + 2 * (self.rotated + self.insert)

    @property
    def spares(self) -> bool:
        """Whether massive tokens are left out of scales."""
        return self.exempt or self.insert

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites of activations that it quantises."""
        return tuple(p.target for p in self.parts if p.target in SITES)

    @property
    def cached(self) -> tuple[Part, ...]:
        """Parts that are keys or values."""
        return tuple(p for p in self.parts if p.target in CACHED)

    @property
    def weights(self) -> Format | None:
        """The format of weights; None: they stay."""
        return next((p.form for p in self.parts if p.target == "weights"), None)

    @property
    def packages(self) -> set[str]:
        """Modules of the extra `quant` that its numbers are made by."""
        kinds = {p.form.kind for p in self.parts}
        return {name for name, of in (("torchao", kinds & MICROSCALED), ("compressed_tensors", kinds - MICROSCALED or
                                                                         self.rotated)) if of}  # fmt: skip

    @property
    def static(self) -> bool:
        """Whether a scale of it is measured before."""
        return any(p.form.static for p in self.parts)

    def form(self, target: str) -> Format | None:
        """The format of a target; None: it stays."""
        return next((p.form for p in self.parts if p.target == target), None)

    def told(self, scales: bool = True) -> str:
        """'activations: int8 by tensor; weights: int4 by groups of 64'; without its scales 'activations: int8'."""
        said: dict[str, list[str]] = {}
        for part in self.parts:
            shared = part.form.shared("row" if part.target == "weights" else "token") if scales else ""
            said.setdefault(part.form.name + shared, []).append(part.target)
        named = {SITES: "activations", CACHED: "keys and values"}
        for form, targets in said.items():
            if {*SITES} < {*targets}:  # all sites of activations, whatever the blocks mix tokens by
                said[form] = [target for target in targets if target not in OTHERS]
        return "; ".join(f"{named.get(tuple(targets), ', '.join(targets))}: {form}" for form, targets in said.items())

    def plain(self) -> Scheme:
        """The same without any remedy."""
        return Scheme(self.name.partition("+")[0], self.parts)

    def at(self, sites: Iterable[str]) -> Scheme:
        """The same at some sites of activations alone; keys, values and weights stay as they are in it."""
        chosen = set(sites)
        kept = tuple(p for p in self.parts if p.target not in SITES or p.target in chosen)
        return replace(self, parts=kept)

    def check(self) -> None:
        """Refuse a remedy that would do nothing, and those that cannot be had together.

        Raises:
            UserError: says which, and why.
        """
        inputs, slots = bool(self.sites), "With massive activations in slots no token is left to spare."
        reached = inputs and bool(set(self.sites) & set(self.smooth_sites)) or self.weights is not None
        for word, asked, able, why in (
            ("exempt", self.exempt, inputs or self.cached, "Weights have no tokens that could be spared."),
            ("exempt", self.exempt, not self.slots, slots), ("insert", self.insert, not self.slots, slots),
            ("insert", self.insert, inputs, "Constant vectors are of activations, and it quantises none."),
            ("smooth", self.smooth is not None, reached, f"It quantises nothing of {', '.join(self.smooth_sites)}."),
            ("super", self.super_weights, self.weights is not None, "It quantises no weights, so none can be spared."),
        ):  # fmt: skip
            if asked and not able:
                raise UserError(f"+{word} does nothing in the scheme {self.name!r}.", why, "Leave it out.")
        for part in self.parts if self.rotated else ():
            smooth = self.smooth is not None and part.target in self.smooth_sites
            if part.form.static and (smooth or part.form.sharing == "channel"):
                raise UserError(f"The scheme {self.name!r} needs the greatest of rotated channels, which is not "
                                f"measured.",
                                do="Leave out -static, or one of the remedies.")  # fmt: skip

    def without(self, skipped: Iterable[tuple[int, str]]) -> Scheme:
        """The same with some (layer, site) in full precision."""
        return replace(self, skipped=self.skipped | frozenset(skipped))


def scheme(name: str) -> Scheme:
    """The scheme of a name, or of a preset of compressed-tensors (W8A8, FP8, NVFP4, ...).

    Raises:
        UserError: it says nothing; says what it could be.
    """
    body, *remedies = [x.strip() for x in name.split("+")]
    if body and body[0].isupper():
        made = _of_preset(body)
    else:
        parts = [part for text in body.split("/") for part in _parts(text, name)]
        made = Scheme(name, tuple(parts))
    targets = [p.target for p in made.parts]
    if len(set(targets)) < len(targets):
        twice = next(t for t in targets if targets.count(t) > 1)
        raise UserError(f"The scheme {name!r} quantises {twice} twice.", do="Give one format for each target.")
    made = replace(made, name=name)
    words = [remedy.partition("=")[0].removesuffix("-all") for remedy in remedies]
    for remedy, word in zip(remedies, words, strict=True):
        if words.count(word) > 1:
            raise UserError(f"The scheme {name!r} has {word!r} twice.", do="Give it once.")
        made = _with(made, remedy, name)
    made.check()
    return made


def _parts(text: str, name: str) -> list[Part]:
    found = _PART.fullmatch(text)
    if found is None:
        raise UserError(f"{text!r} in the scheme {name!r} is no format.",
                        do="Give [TARGET:]FORMAT[-SHARING][-static]: int8-tensor, int4-group32, fp8-token, nvfp4, "
                           "weights:int4-group64, kv:int4-token, mlp_act:int8-tensor-static.")  # fmt: skip
    target = found["target"] or "act"
    if target not in TARGETS:
        raise UserError(f"{target!r} in the scheme {name!r} is nothing to quantise.", do=near(target, TARGETS))
    form = _format(found, target, name)
    return [Part(one, form) for one in TARGETS[target]]


def number_format(spelled: str) -> Format:
    """A format by its name: int8-token, int4-group64, fp8-tensor-static, nvfp4.

    Raises:
        UserError: it is none.
    """
    found = _PART.fullmatch(spelled)
    if found is None or found["target"]:
        raise UserError(
            f"{spelled!r} is no number format.", do="For example: int8-token, int4-group64, fp8-tensor, nvfp4."
        )
    return _of_words(found, spelled)


def _of_words(found: re.Match[str], name: str) -> Format:
    word, sharing, static = found["format"], found["sharing"], bool(found["static"])
    kind, bits = (word, 8) if word[0] != "i" else ("int", int(word[3:]))
    if sharing == "static":  # int8-static: the sharing that is meant where none is said
        sharing, static = None, True
    if kind in ("mxfp4", "nvfp4"):
        if sharing or (static and kind == "mxfp4"):
            raise UserError(f"{name!r}: {kind} has blocks of its own.", do=f"Say {kind} alone.")
        return Format(kind, 4, "block", static=static)
    sharing, known = sharing or "tensor", {*SHARINGS, *(["none"] if kind == "fp8" else [])}
    if sharing not in known or (sharing == "group") != bool(found["group"]) or found["group"] == "0" * len(
        found["group"] or "-"):  # fmt: skip
        raise _unshared(name, f"{sharing}{found['group'] or ''}", known)
    return Format(kind, bits, sharing, int(found["group"] or 0), static)


def _unshared(name: str, sharing: str, known: set[str]) -> UserError:
    what = f"{name!r}: scales of this are not shared by {sharing}."
    return UserError(what, do=near(sharing, {f"{s}32" if s == "group" else s for s in known}))


def _format(found: re.Match[str], target: str, name: str) -> Format:
    """The format of a part, as its target can have it."""
    made = _of_words(found, name)
    of_act, of_weights = target in ("act", *SITES), target == "weights"
    lacks = {"head"} if of_act else {"token", "head"} if of_weights else set()
    if made.sharing in lacks:
        raise _unshared(name, made.sharing, {*SHARINGS} - lacks)
    if made.static and not (of_act and made.sharing in ("tensor", "channel", "block")):
        raise UserError(
            f"{name!r}: a scale that is measured before is of a whole tensor, or of a channel, of activations.",
            do="Leave out -static.",
        )
    return replace(made, sharing="token") if of_weights and made.sharing == "channel" else made  # a row of the weight


def _of_preset(name: str) -> Scheme:
    given, parts = preset(name), []
    if given.weights is not None:
        parts.append(Part("weights", of_arguments(given.weights, True)))
    if given.input_activations is not None:
        form = of_arguments(given.input_activations, False)
        parts += [Part(site, form) for site in SITES]
    if not parts:
        raise UserError(f"The preset {name} quantises nothing.", do="Choose another.")
    return Scheme(name, tuple(parts))


def _with(made: Scheme, remedy: str, name: str) -> Scheme:
    word, sign, value = remedy.partition("=")
    if word not in REMEDIES or (sign and not word.startswith("smooth")):
        raise UserError(f"{remedy!r} in the scheme {name!r} is no remedy.", do=near(word, REMEDIES))
    if word.startswith("smooth"):
        try:
            strength = float(value) if sign else STRENGTH
        except ValueError:
            strength = -1.0
        if not 0 <= strength <= 1:
            raise UserError(f"{remedy!r} has no strength from 0 to 1.", do=f"For example: {word}=0.5")
        return replace(made, smooth=strength, smooth_sites=SITES if word == "smooth-all" else SMOOTHED)
    changed: dict[str, Any] = {{"hadamard": "rotated", "super": "super_weights"}.get(word, word): True}
    return replace(made, **changed)
