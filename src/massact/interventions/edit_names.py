"""Edits by the names that the command line knows, such as `zero`, `scale=0.5`, `cut-first` or `norm-dims`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from massact.anatomy import norms_of
from massact.corpora import Corpus
from massact.interventions.catalogue import (
    QUARTET,
    Massive,
    clip,
    cut_attention,
    drop_first,
    fixed,
    replace_first,
    scale,
    super_weights,
    zero_dims,
)
from massact.interventions.norm_scales import parameters_of, silenced
from massact.interventions.registers import CONTROLS, collect_registers, fix_registers
from massact.models import Model
from massact.records.errors import UserError, near
from massact.trace import Edit, Together
from massact.trace.edits import AnyEdit

# What each name stands for: shown in the help and the reference.
NAMES: dict[str, str] = {
    "zero": "massive activations to 0 (Sun 2024)",
    "mean": "to their mean, by position class and dim (Sun 2024)",
    "random": "the control: as many entries near the median to 0",
    "shuffle": "to what another sequence has there",
    "scale=F": "times F",
    "clip=C": "to at most C in magnitude",
    "value=V": "to V",
    "dims": "whole massive dims to 0, at all tokens",
    "dims=3+17": "other dims to 0, at all tokens",
    "drop-first=N": "without the first N tokens (1 if no number is given)",
    "replace-first=TOKEN": "another first token: its text or its id",
    "cut-first": "no attention on the first position, in all layers",
    "cut=0+5": "the same for other positions",
    "norm-dims": "scale and bias of the blocks' norms to 0 at the massive dims (Kovaleva 2021)",
    "registers=HOW": "registers of an image model, at the input of every block: mean over images (Fix-Reg-Mean, Sun "
    "2024), or a control: noise, shuffle (another image's), zero",
    "weight=NAME[R,C]": "one weight to 0, such as the super weight that `explain` found (Yu 2024)",
    "keep-weight=NAME[R,C]": "all other weights of that matrix to 0",
}
_OF_MASSIVE: dict[str, Callable[[Massive, float], Edit]] = {"scale": scale, "clip": clip, "value": fixed}
_BARE = ("dims", "drop-first", "cut-first", "norm-dims")
_WITH = (*_OF_MASSIVE, "dims", "drop-first", "replace-first", "cut", "registers", "weight", "keep-weight")
_WEIGHT = re.compile(r"^(?P<name>.+)\[(?P<row>\d+),\s*(?P<column>\d+)\]$")


@dataclass(frozen=True)
class Setting:
    """What a name is read against.

    Args:
        model: whose norms and tokenizer are asked.
        targets: the massive activations of every layer that is edited.
        images: over which registers are collected; None where there are none.
        seed: of what is drawn.
    """

    model: Model
    targets: tuple[Massive, ...]
    images: Corpus | None = None
    seed: int = 0


def check_name(name: str) -> None:
    """Refuse a name that stands for nothing, before minutes are spent on loading.

    Raises:
        UserError: unknown (says which are near), or its value cannot be read.
    """
    word, sign, value = name.partition("=")
    if not sign and (word in QUARTET or word in _BARE):
        return
    if word not in _WITH:
        raise UserError(f"Unknown edit {name!r}.", do=near(name, NAMES))
    if word in _OF_MASSIVE:
        _number(name, value)
    elif word in ("dims", "cut"):
        _whole(name, value)
    elif word == "drop-first":
        if len(n := _whole(name, value)) != 1 or n[0] < 1:
            raise UserError(f"{name!r} needs one number of tokens, from 1 on.", do="For example: drop-first=1")
    elif not value:
        raise UserError(f"{name!r} needs a value.", do=f"{next(n for n in NAMES if n.startswith(word + '='))}")
    elif word == "registers" and value not in CONTROLS:
        raise UserError(f"{name!r} is no way to change registers.", do=f"Say one of: {', '.join(CONTROLS)}.")
    elif word.endswith("weight") and not _WEIGHT.match(value):
        raise UserError(f"{name!r} names no weight.", do=f"For example: {word}=layers.1.mlp.down_proj.weight[7,3]")


def edit_named(name: str, setting: Setting) -> AnyEdit:
    """The edit that a name stands for.

    Args:
        name: one of `NAMES`.

    Raises:
        UserError: see `check_name`; a token that is none, a model without norms, registers or without seen attention.
    """
    check_name(name)
    word, sign, value = name.partition("=")
    if word in QUARTET or word in _OF_MASSIVE or word == "dims":
        return _at_layers(name, word, value, setting)
    if word == "drop-first":
        return drop_first(_whole(name, value)[0] if sign else 1)
    if word == "replace-first":
        return replace_first(_token(value, setting.model))
    if word in ("cut-first", "cut"):
        return cut_attention(_whole(name, value) if sign else [0])
    if word == "registers":
        if setting.images is None:
            raise UserError("Registers need images to be collected from.")
        stack = setting.targets[0].site.stack
        return fix_registers(collect_registers(setting.model, setting.images, stack=stack), value, seed=setting.seed)
    if word == "norm-dims":
        dims = sorted({d for t in setting.targets for d in t.dims})
        stack = setting.model.anatomy.stack(setting.targets[0].site.stack)
        parameters, _ = parameters_of(setting.model, [path for _, path in norms_of(setting.model.module, stack)])
        if not parameters:
            raise UserError("The model's norms have no scales.", do="Leave out norm-dims.")
        return silenced(name, parameters, dims)
    found = _WEIGHT.match(value)
    assert found is not None
    entry = int(found["row"]), int(found["column"])
    weight = dict(setting.model.module.named_parameters()).get(found["name"])
    if weight is not None and not (weight.ndim == 2 and all(i < n for i, n in zip(entry, weight.shape, strict=True))):
        raise UserError(f"{found['name']} has shape {tuple(weight.shape)}, no entry {list(entry)}.")
    return super_weights(found["name"], [entry], keep_only=word == "keep-weight")


def _at_layers(name: str, word: str, value: str, setting: Setting) -> AnyEdit:
    """An edit of the massive activations at one layer, or at several as one."""

    def make(target: Massive) -> Edit:
        if word in QUARTET:
            return QUARTET[word](target)
        if word in _OF_MASSIVE:
            return _OF_MASSIVE[word](target, _number(name, value))
        dims = _whole(name, value) if value else target.dims
        width = setting.model.anatomy.stack(target.site.stack).d_model
        if max(dims) >= width:
            raise UserError(f"{name!r} names a dim that is not there.", f"The hidden state has dims 0 to {width - 1}.")
        return zero_dims(dims, str(target.site))

    targets = setting.targets
    if len(targets) == 1:
        return make(targets[0])
    return Together(f"{name}, {len(targets)} layers", tuple(make(t) for t in targets))


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    word = name.partition("=")[0]
    if not math.isfinite(number) or (word == "clip" and number < 0):
        kind = "a number from 0 on" if word == "clip" else "a number"
        raise UserError(f"{name!r} needs {kind}.", do=f"For example: {word}=0.5")
    return number


def _whole(name: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split("+")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0:
        raise UserError(f"{name!r} needs whole numbers.", do=f"For example: {name.partition('=')[0]}=0+5")
    return numbers


def _token(text: str, model: Model) -> int:
    """The id of a token, given by its text or as a number."""
    if model.tokenizer is not None:
        ids = model.tokenizer.encode(text.replace("\\n", "\n"), add_special_tokens=False)
        unknown = getattr(model.tokenizer, "unk_token_id", None)
        if len(ids) == 1 and (ids[0] != unknown or text == model.tokenizer.unk_token):
            return int(ids[0])
    if text.isdecimal() and (model.vocabulary is None or int(text) < model.vocabulary):
        return int(text)
    raise UserError(f"{text!r} is not one token of this model.", do="Give one token, or its id.")
