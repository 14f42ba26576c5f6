"""Which matrices read what: the Linear modules behind every site, and those that read none of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os.path import commonprefix

import torch
from torch import Tensor, nn

from massact.anatomy.discovery import run_example
from massact.models import Model
from massact.quantisation.schemes import OTHERS, SITES
from massact.records.anatomy import Block, Place
from massact.records.errors import UserError
from massact.records.sites import READER, Site
from massact.trace.hooks import tapped
from massact.trace.integrity import unchanged


@dataclass(frozen=True)
class Linears:
    """The matrices of a stack.

    Args:
        readers: site -> dotted names of the modules that read it.
        others: modules in the blocks that read something else: they stay as they are where activations are quantised.
        widths: site -> F.
        missing: point -> layers that do not have it, with the reason.
        same: point -> the point whose tensor it is, in blocks whose attention and MLP read the same norm.
        no_matrices: weights of the blocks that are no matrices (experts in one tensor): they stay as they are.
    """

    readers: dict[Site, tuple[str, ...]]
    others: tuple[str, ...]
    widths: dict[Site, int]
    missing: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    no_matrices: tuple[str, ...] = ()

    def at(self, point: str) -> list[Site]:
        """The sites of a point, layer by layer; of blocks with two MLPs both."""
        return [s for s in self.readers if point_of(s) == point]

    @property
    def modules(self) -> list[str]:
        """All of them, in the order of the blocks."""
        return list(dict.fromkeys([*(name for names in self.readers.values() for name in names), *self.others]))

    def notes(self) -> list[str]:
        """What is not quantised, one sentence each."""
        told = [
            f"No {point} at layers {', '.join(map(str, layers))}: {why}."
            for point, (layers, why) in self.missing.items()
        ]
        told += [f"{point} is the tensor of {one} here: it is quantised once, as {one}."
                 for point, one in self.same.items()]  # fmt: skip
        if self.others:
            told.append(f"What {_few(self.others)} read is none of the sites, so their inputs stay as they are.")
        if self.no_matrices:
            told.append(f"Weights that are no matrices stay in full precision: {_few(self.no_matrices)}.")
        return told


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def point_of(site: Site) -> str:
    """The point of a site, without the number of a second sublayer."""
    return site.point.rstrip("0123456789").rstrip("_") if site.point not in SITES else site.point


def is_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies by a weight (2-D), as Linear and Conv1D do; embeddings look up."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def by_rows(module: nn.Module) -> bool:
    """Whether its weight is (outputs, inputs); Conv1D of GPT-2 keeps (inputs, outputs)."""
    return type(module).__name__ != "Conv1D"


def own_inputs(model: Model, stack: str) -> Model:
    """The same model, in which no site that is quantised is the residual stream itself, which must stay as it is.

    Where a sublayer reads the stream without a norm between (post-LN, OLMo 2), each matrix that reads it has a site of
    its own at its input, `attn_in` and `attn_in__2`, ...; they are one site in all that is told (`primary`).
    """
    linears, blocks, known = linears_of(model, stack), [], dict[tuple[str, str], tuple[str, ...]]()
    for block in model.anatomy.stack(stack).blocks:
        stream = {_border(p) for point, p in block.places.items() if point.startswith("resid")}
        places, why = dict(block.places), dict(block.unavailable)
        for point, place in block.places.items():
            site = Site(stack, block.layer, point)
            if site not in linears.readers or _border(place) not in stream:
                continue
            names = linears.readers[site] or known.get((block.module, point), ())  # blocks may share their modules
            known[block.module, point] = names
            if not names:
                del places[point]
                why[point] = "it is the residual stream, and no matrix is known that reads it"
            for k, name in enumerate(names):
                places[f"{point}{READER}{k + 1}" if k else point] = Place(name, "in", (0,), place.call)
        blocks.append(replace(block, places=places, unavailable=why))
    stacks = tuple(replace(s, blocks=tuple(blocks)) if s.name == stack else s for s in model.anatomy.stacks)
    return replace(model, anatomy=replace(model.anatomy, stacks=stacks)) if known else model


def primary(site: Site) -> Site:
    """The site that stands for all readers of one tensor."""
    return replace(site, point=site.point.partition(READER)[0])


def _border(place: Place) -> tuple[object, ...]:
    return place.module, place.side, place.path, place.call


def linears_of(model: Model, stack: str) -> Linears:
    """Find out in one short pass which modules read what every site holds.

    Raises:
        UserError: the blocks have none of the sites.
    """
    blocks = model.anatomy.stack(stack).blocks
    sites = {s: p for s, p in model.anatomy.sites().items() if s.stack == stack and point_of(s) in SITES}
    sites, same = _apart(sites)
    if not sites:
        raise UserError("The blocks of this model read no site that can be quantised.",
                        f"They have none of {', '.join(SITES)}.")  # fmt: skip
    held: dict[Site, Tensor] = {}
    read: dict[str, Tensor] = {}

    def keep(store: dict, key: object) -> Callable[[Tensor], None]:
        return lambda x: store.setdefault(key, x.detach())

    names = [f"{b.module}.{n}" for b in {b.module: b for b in blocks}.values()
             for n, m in model.module.get_submodule(b.module).named_modules() if n and is_matrix(m)]  # fmt: skip
    taps = [(p, keep(held, s)) for s, p in sites.items()] + [(Place(n, "in", (0,)), keep(read, n)) for n in names]
    with torch.inference_mode(), unchanged(model.module), tapped(model.module, taps) as state:
        state.begin()
        run_example(model.module, model.example)
    at: dict[tuple[int, int], list[Site]] = {}
    for s, x in held.items():
        at.setdefault(_address(x), []).append(s)
    readers: dict[Site, list[str]] = {s: [] for s in sites}
    others: list[str] = []
    for name in names:
        known = at.get(_address(read[name]), []) if name in read else []
        of = [readers[s] for s in sorted(known, key=lambda s: -len(commonprefix([sites[s].module, name])))]
        (of[0] if of else others).append(name)
    widths = {s: held[s].shape[-1] for s in sites if s in held}
    read_by: dict[Site, tuple[str, ...]] = {}
    for s, found in readers.items():
        read_by[primary(s)] = read_by.get(primary(s), ()) + tuple(found)
    return Linears(read_by, tuple(others), widths, _missing(model, stack), same, _no_matrices(model, blocks))


def _apart(sites: Mapping[Site, Place]) -> tuple[dict[Site, Place], dict[str, str]]:
    """Sites of one place once: the first; and point -> the point that it is, of the others."""
    first: dict[object, Site] = {}
    same: dict[str, str] = {}
    order = sorted(sites, key=lambda s: (s.layer, SITES.index(point_of(s))))
    for site in order:
        one = first.setdefault((site.layer, *_border(sites[site])), site)
        if one != site:
            same[site.point] = one.point
    chosen = set(first.values())
    return {s: p for s, p in sites.items() if s in chosen}, same


def _no_matrices(model: Model, blocks: Sequence[Block]) -> tuple[str, ...]:
    """Parameters of the blocks with more than two axes: experts, convolutions."""
    modules = {b.module: model.module.get_submodule(b.module) for b in blocks}
    return tuple(f"{name}.{p}" for name, m in modules.items() for p, w in m.named_parameters() if w.ndim > 2)


def _address(x: Tensor) -> tuple[int, int]:
    """Where a tensor lies, and how many entries it has: a view of another shape is still the same numbers."""
    return x.data_ptr(), x.numel()


def _missing(model: Model, stack: str) -> dict[str, tuple[tuple[int, ...], str]]:
    found: dict[str, tuple[list[int], str]] = {}
    for block in model.anatomy.stack(stack).blocks:
        for point in SITES:
            stands_in = any(other in block.places for other in OTHERS) and point == "attn_in"
            if point not in block.places and point not in OTHERS and not stands_in:
                why = block.unavailable.get(point, "the block has no such sublayer")
                found.setdefault(point, ([], why))[0].append(block.layer)
    return {point: (tuple(layers), why) for point, (layers, why) in found.items()}
