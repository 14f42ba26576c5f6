"""What lies before an edit and is the same without it: blocks that need not run again, attention out of its reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from massact.models import Model
from massact.records.anatomy import Block, Stack
from massact.records.sites import Site
from massact.trace import AttentionEdit, Edit, KeyValueEdit, Together
from massact.trace.edits import AnyEdit
from massact.trace.replay import Prefix


@dataclass(frozen=True)
class Reach:
    """Which part of a stack lies behind an edit.

    Args:
        stack: its name; of several streams that of the stack that reads them.
        before: the blocks 1..before give what they give without the edit.
        attends: the first layer whose attention call may be another one.
    """

    stack: str
    before: int
    attends: int


def reach_of(model: Model, edit: AnyEdit) -> Reach | None:
    """What an edit of tensors or attention calls in one stack can reach, the first of several; None for all others."""
    if isinstance(edit, Together):
        places = [reach_of(model, one) for one in edit.edits]
        return _first([place for place in places if place is not None]) if None not in places else None
    if isinstance(edit, Edit):
        sites = list(model.anatomy.select(edit.site))
    elif isinstance(edit, (AttentionEdit, KeyValueEdit)):
        sites = list(model.anatomy.select_attention(edit.site))
    else:
        return None
    if any(site.point == "logits" for site in sites):
        return None
    first = _first([_reach(model.anatomy.stack(site.stack), site) for site in sites])
    if first is None:
        return None
    if model.placeholders and first.stack != model.anatomy.stacks[-1].name:
        return None  # a mixed model may take the features of an image from any block of its tower: all must run
    if model.anatomy.stack(first.stack).skips:
        return None  # what earlier blocks gave is read again later (U-Net): all must run
    return first


def _first(places: Sequence[Reach]) -> Reach | None:
    """What all of these reach together; None where they are in several stacks."""
    if len({place.stack for place in places}) != 1:
        return None
    return Reach(places[0].stack, min(p.before for p in places), min(p.attends for p in places))


def _reach(stack: Stack, site: Site) -> Reach:
    """What an edit at one site reaches."""
    name = stack.stream_of or stack.name
    if site.layer < 1:
        return Reach(name, 0, 1)
    if site.point == "resid_post":
        return Reach(name, site.layer, site.layer + 1)
    before = 0 if _shares_parts(stack, site.layer - 1) else site.layer - 1
    return Reach(name, before, site.layer + _behind_attention(stack.blocks[site.layer - 1], site.point))


def _shares_parts(stack: Stack, layer: int) -> bool:
    """Whether blocks behind a layer run modules inside those up to it (ALBERT), of which all calls are counted."""
    before = tuple(f"{block.module}." for block in stack.blocks[:layer])
    places = [p for block in stack.blocks[layer:] for p in block.places.values()]
    return any(place.module.startswith(before) for place in places)


def _behind_attention(block: Block, point: str) -> bool:
    """Whether a point of a block comes behind its (first) attention, which then cannot see an edit there."""
    written = {name: i for i, one in enumerate(block.sums) for name in one.writes}
    if "attn_out" not in written or point == "attention":
        return False
    first = {block.places[name] for name in ("resid_pre", "attn_in") if name in block.places}
    if block.places.get(point) in first:
        return False  # parallel blocks, whose sublayers may read one tensor
    ends = {one.start: i - 1 for i, one in enumerate(block.sums)} | {one.end: i for i, one in enumerate(block.sums)}
    at = ends.get(point, written.get(_write_of(point), -1))
    return at > written["attn_out"] or (at == written["attn_out"] and point != "attn_in")


def _write_of(point: str) -> str:
    """The write of the sublayer that a point belongs to: mlp_out_2 of mlp_act_2."""
    for inner, write in (("o_in", "attn_out"), ("_in", "_out"), ("_act", "_out"), ("attention", "attn_out")):
        point = point.replace(inner, write)
    return point


def prefixes_of(model: Model, edits: Sequence[AnyEdit], attention: bool) -> dict[tuple[str, int], Prefix]:
    """(stack, layer) -> the blocks up to that layer, where an edit leaves them as they are.

    Args:
        attention: attention behind the edits is looked at.
    """
    found: dict[tuple[str, int], Prefix] = {}
    for reach in {reach for edit in edits if (reach := reach_of(model, edit)) is not None}:
        stack = model.anatomy.stack(reach.stack)
        if reach.before > 0 and not (attention and _shares_parts(stack, reach.before)):
            found[stack.name, reach.before] = Prefix(model.module, stack, reach.before)
    return found
