"""Recipes: what a user of llm-compressor or torchao runs to get what was measured here, and what neither can say.

Both quantise modules that are `torch.nn.Linear`, chosen by dotted name, and know no tokens. What a recipe leaves out is
in `unsupported`, and at the head of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from massact.quantisation.module_patterns import frame_of, patterns_of
from massact.quantisation.number_formats import Format
from massact.quantisation.schemes import number_format
from massact.quantisation.torchao_configs import config_of, script_of
from massact.records.errors import UserError, near

LIBRARIES = {"llmcompressor": "llm-compressor", "torchao": "torchao"}
_STRATEGY = {"head": "attn_head"}
# NVFP4 has one global scale for what vLLM runs as one matrix, so that llm-compressor quantises all of these or none.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))
# By which names SpinQuantModifier finds its way; it has no option for others.
_SPUN = {
    "input_layernorm": {"q_proj", "k_proj", "v_proj"},
    "post_attention_layernorm": {"gate_proj", "up_proj"},
}
_WRITERS = {"o_proj", "down_proj"}


@dataclass(frozen=True)
class Group:
    """Modules that are quantised alike.

    Args:
        modules: their dotted names.
        weights, activations: formats, see `schemes.number_format`; a row of a weight is a channel; "" leaves them in
            full precision.
    """

    modules: tuple[str, ...]
    weights: str = ""
    activations: str = ""


@dataclass(frozen=True)
class Recipe:
    """What is quantised in one model, how, and what is done about its massive activations, in plain values.

    Args:
        name: of the scheme.
        linears: (dotted name, inputs) of every `torch.nn.Linear` of the model, also of its head; what is in no group
            stays as it is.
        groups: what is quantised.
        preset: a preset of compressed-tensors that says the same as the one group, such as W8A8.
        kv: format of the cache of keys and values; "" full precision.
        rotated: by Hadamard matrices: residual stream (R1), values of each head (R2), input of down_proj (R4).
        smoothing: strength of SmoothQuant; None: none.
        readers: (norm, names of the modules that read it), for both of these.
        smooth_all: it was measured with smoothing where no norm can take the scales, too.
        exempt: massive tokens passed as they are, and counted in no scale.
        prefix: token ids in front of every text.
        others: weight matrices of the scheme that are no `torch.nn.Linear` (Conv1D of GPT-2).
        apart: what else was measured that no library does, one sentence each.
    """

    name: str
    linears: tuple[tuple[str, int], ...]
    groups: tuple[Group, ...]
    preset: str = ""
    kv: str = ""
    rotated: bool = False
    smoothing: float | None = None
    readers: tuple[tuple[str, tuple[str, ...]], ...] = ()
    smooth_all: bool = False
    exempt: bool = False
    prefix: tuple[int, ...] = ()
    others: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All Linear modules."""
        return tuple(name for name, _ in self.linears)

    @property
    def quantised(self) -> tuple[str, ...]:
        """Those that are quantised, in the order of the model."""
        chosen = {name for group in self.groups for name in group.modules}
        return tuple(name for name in self.names if name in chosen)

    @property
    def kept(self) -> tuple[str, ...]:
        """Those that stay in full precision."""
        chosen = set(self.quantised)
        return tuple(name for name in self.names if name not in chosen)

    @property
    def calibrated(self) -> bool:
        """Whether llm-compressor needs text."""
        return bool(self.kv or self.smoothing is not None) or any(
            number_format(g.activations).static or g.activations.startswith("nvfp")
            for g in self.groups
            if g.activations
        )


def llmcompressor_recipe(recipe: Recipe) -> str:
    """The recipe of llm-compressor's `oneshot`, as YAML: modifiers in the order in which they must run.

    Rotation comes first, since it folds the gains of norms into what reads them, and with them the scales of a
    smoothing that was there before; quantisation is last.

    Raises:
        UserError: nothing is left to quantise, or a group does not divide what it should.
    """
    _check(recipe, "llmcompressor")
    modifiers: dict[str, Any] = {}
    if recipe.rotated and not _unspun(recipe):
        modifiers["SpinQuantModifier"] = {"rotations": ["R1", "R2", "R4"], "transform_type": "random-hadamard"}
    if recipe.smoothing is not None and recipe.readers:
        modifiers["SmoothQuantModifier"] = {"smoothing_strength": recipe.smoothing, "mappings": _mappings(recipe)}
    quantisation = _quantisation(recipe)
    if len(quantisation) > 1:
        modifiers["QuantizationModifier"] = quantisation
    text: str = yaml.safe_dump({"quant_stage": {"quant_modifiers": modifiers}}, sort_keys=False, width=110)
    return _head(recipe, "llmcompressor", _how_to_run(recipe)) + text


def torchao_script(recipe: Recipe) -> str:
    """A script `MODEL OUT`: loads a transformers model, quantises it with torchao, proves what was quantised, saves it.

    Raises:
        UserError: torchao can do nothing of it.
    """
    _check(recipe, "torchao")
    entries: list[tuple[str, str]] = []
    for group in recipe.groups:
        config, _ = _torchao(group)
        if config:
            entries += [(p[:-1], config) for p in patterns_of(group.modules, recipe.names, always_regex=True)]
    if not entries:
        raise UserError(
            f"torchao has nothing for the scheme {recipe.name!r}.",
            " ".join(unsupported(recipe, "torchao")),
            "Add weights: torchao quantises activations only where it quantises the weights they meet.",
        )
    n_quantised = sum(len(g.modules) for g in recipe.groups if _torchao(g)[0])
    return script_of(entries, n_quantised, _head(recipe, "torchao", ()))


def unsupported(recipe: Recipe, library: str) -> list[str]:
    """What was measured and the library cannot do, one sentence each.

    Raises:
        UserError: no such library.
    """
    if library not in LIBRARIES:
        raise UserError(f"{library!r} has no recipes here.", do=near(library, LIBRARIES))
    told = []
    if recipe.exempt:
        told.append("Massive tokens are quantised, and count in every scale: no kernel treats tokens differently.")
    if recipe.prefix:
        told.append(f"The prefix {list(recipe.prefix)} is none of its business: the serving engine puts it in front.")
    if recipe.others:
        told.append(f"{_some(recipe.others)} stay in full precision: they are no torch.nn.Linear.")
    told += recipe.apart
    return told + (_not_in_llmcompressor(recipe) if library == "llmcompressor" else _not_in_torchao(recipe))


def prefix_guide(recipe: Recipe, tokens: Sequence[str] = ()) -> str:
    """What a serving engine has to do so that massive activations stay in a prefix, in plain text.

    Args:
        recipe: with the prefix.
        tokens: how its ids are written.

    Raises:
        UserError: there is no prefix.
    """
    if not recipe.prefix:
        raise UserError(f"The scheme {recipe.name!r} has no prefix.", do="massact fold finds one.")
    ids = list(recipe.prefix)
    written = f" ({', '.join(map(repr, tokens))})" if tokens else ""
    static = any(g.activations and number_format(g.activations).static for g in recipe.groups)
    told = [
        f"Put the token ids {ids}{written} in front of every prompt, once, as the very first tokens; add no other BOS.",
        "Give ids, not text: a tokenizer may merge the prefix with what follows.",
        "Switch prefix caching on, so that the prefix is computed once: it is in no batch of later requests then, "
        "and in none of their dynamic scales.",
        f"The text begins at position {len(ids)}, and the context is as much shorter; leave the prefix out of "
        "log-probabilities.",
        "Calibrate with the same prefix in front of every sequence.",
    ]
    if static:
        told.append("llm-compressor measures static scales with the prefix in them, so it does not make them smaller: "
                    "use dynamic scales, or the folded model, which has no such token.")  # fmt: skip
    return "\n".join(f"* {line}" for line in told) + "\n"


def _mappings(recipe: Recipe) -> list[list[Any]]:
    """[patterns of what reads a norm, pattern of the norm]: blocks of one kind together.

    They are said, since the library knows few architectures by name and takes the norms of Llama in all others.
    """
    kinds: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for norm, read in recipe.readers:
        kinds.setdefault(tuple(frame_of(name) for name in (norm, *read)), []).append((norm, *read))
    norms = [norm for norm, _ in recipe.readers]
    made = []
    for rows in kinds.values():
        columns = list(zip(*rows, strict=True))
        patterns = [p for names in columns[1:] for p in patterns_of(names, recipe.names)]
        made.append([patterns, patterns_of(columns[0], norms)[0]])
    return made


def _quantisation(recipe: Recipe) -> dict[str, Any]:
    groups = [g for g in recipe.groups if g.weights or _activations(g)]
    made: dict[str, Any] = {}
    if recipe.preset and len(groups) == 1:
        made |= {"targets": ["Linear"], "scheme": recipe.preset}
    elif groups:
        alone = len(groups) == 1
        made["config_groups"] = {
            f"group_{i}": {"targets": ["Linear"] if alone else patterns_of(g.modules, recipe.names)} | _schemes(g)
            for i, g in enumerate(groups)
        }
    if _cached(recipe):
        made["kv_cache_scheme"] = _arguments(number_format(recipe.kv), "kv")
        if not groups:
            made["targets"] = []  # else every Linear gets an empty scheme
    return made | {"ignore": patterns_of(recipe.kept, recipe.names)}


def _schemes(group: Group) -> dict[str, Any]:
    made = {}
    if group.weights:
        made["weights"] = _arguments(number_format(group.weights), "weights")
    if _activations(group):
        made["input_activations"] = _arguments(number_format(group.activations), "activations")
    return made


def _arguments(form: Format, role: str) -> dict[str, Any]:
    """The arguments of compressed-tensors.

    The observer is said, since the default one is a moving average, in which the first sequence has most of the say.
    """
    made: dict[str, Any] = {"num_bits": form.bits, "type": "int" if form.kind == "int" else "float", "symmetric": True}
    if form.kind == "mxfp4":
        made |= {"strategy": "group", "group_size": form.block, "scale_dtype": "torch.uint8"}
    elif form.kind == "nvfp4":
        made |= {"strategy": "tensor_group", "group_size": form.block, "scale_dtype": "torch.float8_e4m3fn"}
    else:
        made["strategy"] = _STRATEGY.get(form.sharing, form.sharing)
        made |= {"group_size": form.group} if form.sharing == "group" else {}
    if role == "weights":
        return made | {"dynamic": False}
    if form.kind == "nvfp4":
        return made | {"dynamic": "local", "observer": "static_minmax"}
    return made | (
        {"dynamic": False, "observer": "static_minmax"} if form.static or role == "kv" else {"dynamic": True}
    )


def _activations(group: Group) -> bool:
    """Whether compressed-tensors has the format of its activations."""
    if not group.activations:
        return False
    form = number_format(group.activations)
    return form.sharing not in ("channel", "none", "head") and not (
        form.static and form.sharing not in ("tensor", "block")
    )


def _cached(recipe: Recipe) -> bool:
    """Whether llm-compressor can quantise keys and values so: with one static scale, or one a head."""
    if not recipe.kv or number_format(recipe.kv).sharing not in ("tensor", "head"):
        return False
    return any(re.match(r".*(self_attn|attention)$", name.rpartition(".")[0]) for name in recipe.names)


def _not_in_llmcompressor(recipe: Recipe) -> list[str]:
    told = [f"Activations in {g.activations} stay in full precision: their scales are shared by token, group or "
            "tensor, and static only of a whole tensor."
            for g in recipe.groups if g.activations and not _activations(g)]  # fmt: skip
    told += [f"The global scale of {g.activations} is measured on the calibration text, not on what is quantised."
             for g in recipe.groups if g.activations == "nvfp4"]  # fmt: skip
    if recipe.kv and not _cached(recipe):
        told.append(f"Keys and values in {recipe.kv} stay in full precision: they have one scale, or one a head, in "
                    "modules that are called self_attn or attention.")  # fmt: skip
    elif recipe.kv and not number_format(recipe.kv).static:
        told.append("Scales of keys and values are measured on the calibration text, not on what is quantised.")
    if recipe.rotated:
        why = _unspun(recipe)
        told += [f"Nothing is rotated: {why}"] if why else [
            "SpinQuant rotates the residual stream, without the gains of norms, instead of what the norms give; it "
            "unties the embeddings and takes their mean over features out, which RMSNorm notices."]  # fmt: skip
    if recipe.smoothing is not None and not recipe.readers:
        told.append("Nothing is smoothed: no norm is known to take the scales.")
    elif recipe.smooth_all:
        told.append("Smoothing is where a norm takes the scales: not at the inputs of o_proj and down_proj.")
    return told


def _not_in_torchao(recipe: Recipe) -> list[str]:
    told = [why for group in recipe.groups for why in _torchao(group)[1]]
    if recipe.kv:
        told.append(f"Keys and values in {recipe.kv} stay in full precision.")
    if recipe.rotated:
        told.append("Nothing is rotated.")
    if recipe.smoothing is not None:
        told.append("Nothing is smoothed.")
    return list(dict.fromkeys(told))


def _torchao(group: Group) -> tuple[str, list[str]]:
    weights = number_format(group.weights) if group.weights else None
    return config_of(weights, number_format(group.activations) if group.activations else None)


def _unspun(recipe: Recipe) -> str:
    """Why SpinQuantModifier cannot rotate the model; "": it can."""
    if not recipe.readers:
        return "no norm is known whose gains could be folded."
    for norm, read in recipe.readers:
        wanted = _SPUN.get(norm.rpartition(".")[2])
        if wanted is None or {name.rpartition(".")[2] for name in read} != wanted:
            return f"SpinQuantModifier goes by names of Llama, and {norm} with its readers is none of them."
    leaves = {name.rpartition(".")[2] for name in recipe.quantised}
    strange = leaves - _WRITERS.union(*_SPUN.values())
    return f"SpinQuantModifier goes by names of Llama, and {sorted(strange)[0]} is none of them." if strange else ""


def _check(recipe: Recipe, library: str) -> None:
    """Refuse what would not run."""
    unknown = [n for g in recipe.groups for n in g.modules if n not in set(recipe.names)]
    if unknown:
        raise UserError(f"{unknown[0]} is no torch.nn.Linear of the model.", do=near(unknown[0], recipe.names))
    if not recipe.quantised and not (library == "llmcompressor" and _cached(recipe)):
        raise UserError(
            f"{LIBRARIES[library]} has nothing to quantise in this model.", " ".join(unsupported(recipe, library))
        )
    width = dict(recipe.linears)
    for group in recipe.groups:
        for spelled in filter(None, (group.weights, group.activations)):
            size = number_format(spelled).block
            wrong = [name for name in group.modules if width[name] % size]
            if wrong:
                raise UserError(
                    f"{spelled}: groups of {size} do not divide the {width[wrong[0]]} inputs of {wrong[0]}.",
                    f"{LIBRARIES[library]} refuses such modules.",
                    "Choose another group, or leave them out.",
                )
        if library == "llmcompressor" and group.weights.startswith("nvfp"):
            _check_fused(group, recipe)


def _check_fused(group: Group, recipe: Recipe) -> None:
    chosen = set(group.modules)
    for name in group.modules:
        stem, _, leaf = name.rpartition(".")
        for partners in _FUSED:
            alone = [f"{stem}.{p}" for p in partners if leaf in partners and f"{stem}.{p}" not in chosen]
            if alone and set(alone) <= set(recipe.names):
                raise UserError(
                    f"With {group.weights} {alone[0]} cannot stay while {name} is quantised.",
                    "They share one global scale, and llm-compressor stops.",
                    "Leave out both, or neither.",
                )


def _how_to_run(recipe: Recipe) -> tuple[str, ...]:
    data = ", dataset=DATASET, num_calibration_samples=N, max_seq_length=T" if recipe.calibrated else ""
    lines = [
        f'oneshot(model=MODEL, recipe="llmcompressor.yaml", output_dir=OUT{data})   # from llmcompressor import oneshot'
    ]
    if recipe.calibrated:
        lines.append("DATASET may be a datasets.Dataset with input_ids and attention_mask: the text that was measured.")
    return tuple(lines)


def _head(recipe: Recipe, library: str, more: Iterable[str]) -> str:
    """Comment lines at the head of a text."""
    lines = [
        f"{recipe.name}, as measured by massact; {len(recipe.quantised)} of {len(recipe.names)} Linear modules.",
        *more,
    ]
    missing = unsupported(recipe, library)
    lines += ["Not in it:", *(f"* {line}" for line in missing)] if missing else []
    return "".join(f"# {line}\n" for line in lines)


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
