"""Edits by the names that the command line knows, such as `zero`, `scale=0.5`, `cut-first` or `norm-dims`.

To add one: an `EditName` in the table at the end, or in another package (entry point `massact.edits`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from massact.anatomy import norms_of
from massact.corpora import Corpus
from massact.interventions.catalogue import (
    QUARTET,
    clip,
    cut_attention,
    drop_first,
    fixed,
    replace_first,
    scale,
    super_weights,
    zero_dims,
)
from massact.interventions.massive_entries import Massive
from massact.interventions.norm_scales import parameters_of, silenced
from massact.interventions.registers import CONTROLS, collect_registers, fix_registers
from massact.models import Model
from massact.records.errors import UserError, near
from massact.records.extensions import extensions
from massact.trace import Edit, Together
from massact.trace.edits import AnyEdit

_WEIGHT = re.compile(r"^(?P<name>.+)\[(?P<row>\d+),\s*(?P<column>\d+)\]$")


@dataclass(frozen=True)
class Setting:
    """What a name is read against.

    Args:
        model: whose norms and tokenizer are asked.
        targets: the massive activations of every layer that is edited.
        images: over which registers are collected; None where there are none.
        seed: of what is drawn.
        stack: of the registers, where the massive activations are of none that sees images; None: the one that does.
    """

    model: Model
    targets: tuple[Massive, ...]
    images: Corpus | None = None
    seed: int = 0
    stack: str | None = None


@dataclass(frozen=True)
class EditName:
    """One name of an edit, and what it stands for.

    Args:
        name: as the help shows it; behind "=" stands an example of its value, or what it is called.
        says: what the edit does, and its source.
        make: `make(name, value, setting) -> edit`, with the name as it was given and its value as it was read.
        read: `read(name, text) -> value`, of a name with a value, text None where there is none; refuses what is none.
        of_findings: whether it asks for the massive activations of a scan; others can be made where none were found.
    """

    name: str
    says: str
    make: Callable[[str, Any, Setting], AnyEdit]
    read: Callable[[str, str | None], Any] | None = None
    of_findings: bool = True


def edit_named(name: str, setting: Setting) -> AnyEdit:
    """The edit that a name stands for.

    Args:
        name: see `edits`.

    Raises:
        UserError: see `check_name`; a token that is none, a model without norms, registers or without seen attention.
    """
    known, value = _read(name)
    return known.make(name, value, setting)


def check_name(name: str) -> None:
    """Refuse a name that stands for nothing, before minutes are spent on loading.

    Raises:
        UserError: unknown (says which are near), or its value cannot be read.
    """
    _read(name)


def of_findings(name: str) -> bool:
    """Whether an edit asks for the massive activations of a scan.

    Raises:
        UserError: see `check_name`.
    """
    return _read(name)[0].of_findings


def _read(name: str) -> tuple[EditName, Any]:
    """What a name means, and the value in it."""
    word, sign, text = name.partition("=")
    mine = [known for known in edits().values() if known.name.partition("=")[0] == word]
    for known in sorted(mine, key=lambda known: known.read is not None):  # without a value first, where it stands so
        if known.read is not None:
            return known, known.read(name, text if sign else None)
        if not sign:
            return known, None
    raise UserError(f"Unknown edit {name!r}.", do=near(name, edits()))


# -------------------------------------------------------------------------------------------- values
def _number(name: str, text: str | None) -> float:
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    word = name.partition("=")[0]
    if not math.isfinite(number) or (word == "clip" and number < 0):
        kind = "a number from 0 on" if word == "clip" else "a number"
        raise UserError(f"{name!r} needs {kind}.", do=f"For example: {word}=0.5")
    return number


def _whole(name: str, text: str | None) -> list[int]:
    try:
        numbers = [int(part) for part in (text or "").split("+")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0:
        raise UserError(f"{name!r} needs whole numbers.", do=f"For example: {name.partition('=')[0]}=0+5")
    return numbers


def _count(name: str, text: str | None) -> int:
    n = [1] if text is None else _whole(name, text)
    if len(n) != 1 or n[0] < 1:
        raise UserError(f"{name!r} needs one number of tokens, from 1 on.", do="For example: drop-first=1")
    return n[0]


def _given(name: str, text: str | None) -> str:
    if not text:
        word = name.partition("=")[0]
        raise UserError(f"{name!r} needs a value.", do=f"{next(n for n in EDITS if n.startswith(word + '='))}")
    return text


def _control(name: str, text: str | None) -> str:
    if _given(name, text) not in CONTROLS:
        raise UserError(f"{name!r} is no way to change registers.", do=f"Say one of: {', '.join(CONTROLS)}.")
    return _given(name, text)


def _weight(name: str, text: str | None) -> tuple[str, tuple[int, int]]:
    """Name of a parameter, and row and column of one of its entries."""
    found = _WEIGHT.match(_given(name, text))
    if found is None:
        word = name.partition("=")[0]
        raise UserError(f"{name!r} names no weight.", do=f"For example: {word}=layers.1.mlp.down_proj.weight[7,3]")
    return found["name"], (int(found["row"]), int(found["column"]))


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


# -------------------------------------------------------------------------------------------- edits
def _of_massive(make: Callable[..., Edit]) -> Callable[[str, Any, Setting], AnyEdit]:
    """An edit of the massive activations at one layer, or at several as one: `make(target)`, or with the value."""

    def at_layers(name: str, value: Any, setting: Setting) -> AnyEdit:
        made = tuple(make(target) if value is None else make(target, value) for target in setting.targets)
        if len(made) == 1:
            return made[0]
        # One layer of several streams is still one layer.
        n = len({target.site.layer for target in setting.targets})
        return Together(f"{name}, {n} layers" if n > 1 else name, made)

    return at_layers


def _dims(name: str, dims: Sequence[int], setting: Setting) -> AnyEdit:
    def make(target: Massive) -> Edit:
        width = setting.model.anatomy.stack(target.site.stack).d_model
        if max(dims) >= width:
            raise UserError(f"{name!r} names a dim that is not there.", f"The hidden state has dims 0 to {width - 1}.")
        return zero_dims(dims, str(target.site))

    return _of_massive(make)(name, None, setting)


def _registers(name: str, how: str, setting: Setting) -> AnyEdit:
    if setting.images is None:
        raise UserError("Registers need images to be collected from.")
    stacks = (setting.model.anatomy.stack(t.site.stack) for t in setting.targets)
    seeing = (
        s.name for s in stacks if setting.model.reads(s) != "input_ids"
    )  # not what reads the text beside an image
    stack = next(seeing, setting.stack)
    return fix_registers(collect_registers(setting.model, setting.images, stack=stack), how, seed=setting.seed)


def _norms(name: str, _: None, setting: Setting) -> AnyEdit:
    dims = sorted({d for t in setting.targets for d in t.dims})
    stack = setting.model.anatomy.stack(setting.targets[0].site.stack)
    parameters, _unsure = parameters_of(setting.model, [path for _, path in norms_of(setting.model.module, stack)])
    if not parameters:
        raise UserError("The model's norms have no scales.", do="Leave out norm-dims.")
    return silenced(name, parameters, dims)


def _entry(name: str, at: tuple[str, tuple[int, int]], setting: Setting) -> AnyEdit:
    parameter, entry = at
    weight = dict(setting.model.module.named_parameters()).get(parameter)
    if weight is not None and not (weight.ndim == 2 and all(i < n for i, n in zip(entry, weight.shape, strict=True))):
        raise UserError(f"{parameter} has shape {tuple(weight.shape)}, no entry {list(entry)}.")
    return super_weights(parameter, [entry], keep_only=name.startswith("keep-"))


_ALL = (
    EditName("zero", "massive activations to 0 (Sun 2024)", _of_massive(QUARTET["zero"])),
    EditName("mean", "to their mean, by position class and dim (Sun 2024)", _of_massive(QUARTET["mean"])),
    EditName("random", "the control: as many entries near the median to 0", _of_massive(QUARTET["random"])),
    EditName("shuffle", "to what another sequence has there", _of_massive(QUARTET["shuffle"])),
    EditName("scale=F", "times F", _of_massive(scale), _number),
    EditName("clip=C", "to at most C in magnitude", _of_massive(clip), _number),
    EditName("value=V", "to V", _of_massive(fixed), _number),
    EditName("dims", "whole massive dims to 0, at all tokens", _of_massive(lambda t: zero_dims(t.dims, str(t.site)))),
    EditName("dims=3+17", "other dims to 0, at all tokens", _dims, _whole),
    EditName(
        "drop-first=N",
        "without the first N tokens (1 if no number is given)",
        lambda _, n, __: drop_first(n),
        _count,
        of_findings=False,
    ),
    EditName(
        "replace-first=TOKEN",
        "another first token: its text or its id",
        lambda _, text, setting: replace_first(_token(text, setting.model)),
        _given,
        of_findings=False,
    ),
    EditName(
        "cut-first",
        "no attention on the first position, in all layers",
        lambda *_: cut_attention([0]),
        of_findings=False,
    ),
    EditName(
        "cut=0+5",
        "the same for other positions",
        lambda _, positions, __: cut_attention(positions),
        _whole,
        of_findings=False,
    ),
    EditName("norm-dims", "scale and bias of the blocks' norms to 0 at the massive dims (Kovaleva 2021)", _norms),
    EditName(
        "registers=HOW",
        "registers of an image model, at the input of every block: mean over images (Fix-Reg-Mean, Sun 2024), or a "
        "control: noise, shuffle (another image's), zero",
        _registers,
        _control,
        of_findings=False,
    ),
    EditName(
        "weight=NAME[R,C]",
        "one weight to 0, such as the super weight that `explain` found (Yu 2024)",
        _entry,
        _weight,
        of_findings=False,
    ),
    EditName("keep-weight=NAME[R,C]", "all other weights of that matrix to 0", _entry, _weight, of_findings=False),
)
EDITS: dict[str, EditName] = {known.name: known for known in _ALL}


def edits() -> dict[str, EditName]:
    """Name -> edit: ours, and those that other packages name (entry point `massact.edits`).

    Raises:
        UserError: what another package names is no `EditName`, or is called like another.
    """
    return extensions("massact.edits", EditName, EDITS)
