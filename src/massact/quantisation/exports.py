"""From a scheme that was measured to files for other libraries."""

from __future__ import annotations

from torch import nn

from massact.models import Model
from massact.quantisation.linears import Linears, point_of
from massact.quantisation.recipes import Group, Recipe, llmcompressor_recipe, prefix_guide, torchao_script
from massact.quantisation.schemes import SITES, Scheme
from massact.records.errors import UserError


def exports_of(recipe: Recipe) -> tuple[dict[str, str], list[str]]:
    """Name of a file -> its text, and why others are not there, one sentence each."""
    files, notes = {}, []
    for name, make in (("llmcompressor.yaml", llmcompressor_recipe), ("torchao.py", torchao_script)):
        try:
            files[name] = make(recipe)
        except UserError as error:
            notes.append(" ".join(filter(None, (f"No {name} of {recipe.name}: {error.what}", error.why))))
    if recipe.prefix:
        files["prefix.md"] = prefix_guide(recipe)
    return files, notes


def recipe_of(one: Scheme, linears: Linears, model: Model, prefix: tuple[int, ...] = ()) -> Recipe:
    """A scheme in plain values, for one model.

    What a scheme skips stays in full precision, weights too: no library leaves one input alone. Modules that read no
    site get what the weights get.

    Args:
        linears: of the stack that was measured.
        prefix: token ids that were in front of every text.
    """
    matrices = {n: m.in_features for n, m in model.module.named_modules() if isinstance(m, nn.Linear)}
    weights = "" if one.weights is None else one.weights.spelled(row="channel")
    alike: dict[tuple[str, str], list[str]] = {}
    for site, names in linears.readers.items():
        form = one.form(point_of(site))
        if (weights or form is not None) and (site.layer, point_of(site)) not in one.skipped:
            alike.setdefault((weights, "" if form is None else form.spelled()), []).extend(names)
    if weights and linears.others:
        alike.setdefault((weights, ""), []).extend(linears.others)
    chosen = [name for names in alike.values() for name in names]
    groups = tuple(Group(tuple(n for n in names if n in matrices), *forms) for forms, names in alike.items())
    cached, apart = _cached(one)
    preset = one.name.partition("+")[0]
    return Recipe(
        one.name, tuple(matrices.items()), tuple(g for g in groups if g.modules), kv=cached, rotated=one.rotated,
        preset=preset if preset[0].isupper() and not one.cached else "", smoothing=one.smooth,
        smooth_all=one.smooth is not None and one.smooth_sites == SITES, readers=_readers(linears, model),
        exempt=one.exempt, prefix=prefix, others=tuple(n for n in chosen if n not in matrices),
        apart=(*apart, *_apart(one)),
    )  # fmt: skip


def _cached(one: Scheme) -> tuple[str, list[str]]:
    """The format of keys and values, which libraries have one of for both; and what is left out for that."""
    forms = {part.target: part.form.spelled() for part in one.cached}
    if not forms or (len(forms) == 2 and len(set(forms.values())) == 1):
        return next(iter(forms.values()), ""), []
    told = " and ".join(f"{name} in {form}" for name, form in forms.items())
    return "", [f"The cache stays in full precision ({told}): keys and values have one format, both of them."]


def _readers(linears: Linears, model: Model) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(norm, what reads it), where a site is what a norm gives."""
    made = []
    for site, names in linears.readers.items():
        place = model.anatomy.sites()[site]
        gains = getattr(model.module.get_submodule(place.module), "weight", None)
        if place.side == "out" and names and gains is not None and gains.ndim == 1:
            made.append((place.module, names))
    return tuple(made)


def _apart(one: Scheme) -> list[str]:
    told = []
    if one.insert:
        told.append("Massive tokens are not replaced by one constant vector for each cluster: no kernel knows tokens.")
    if one.slots:
        told.append("Massive activations are not folded into slots: give the model that massact fold has saved.")
    if one.super_weights:
        told.append("The largest weights that meet massive activations are rounded like all others.")
    return told
