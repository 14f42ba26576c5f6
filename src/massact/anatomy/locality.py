"""Terms that leave tokens and dims where they are: shown by scaling what each is made from, entry by entry.

The proof of the sums does not tell: a term that is moved to another token, or is a mean over them, adds up as well.

Shapes: B batch, T tokens, D dims.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from massact.records.anatomy import Anatomy, Formula, Place
from massact.records.errors import ProofError
from massact.trace.formulas import Gathered
from massact.trace.hooks import tapped
from massact.trace.parameter_values import NamedTensors

_FACTORS = (1.0, -1.0, 0.5, -0.5)  # powers of two: nothing is rounded, nothing grows


def prove_local(module: nn.Module, anatomy: Anatomy, run: Callable[[], Any], tolerance: float) -> None:
    """Check that each term is linear in what it is made from, and leaves it at its token and dim.

    With f a term of a leaf x, and M random powers of two of each token and dim, f(M x) = M f(x). A term of several
    streams may mix these.

    Args:
        module, anatomy: of a model whose sums add up.
        run: runs it on the example.
        tolerance: of rounding.

    Raises:
        ProofError: names the block, the term, and what it is made from.
    """
    named = NamedTensors(module)
    terms = {
        (block.module, point): Gathered(place.formula, named)
        for stack in anatomy.stacks
        for block in stack.blocks
        for point, place in block.places.items()
        if place.formula is not None and not point.startswith("bias_out")  # of nothing that passes
    }
    if not terms:
        return
    with torch.inference_mode():
        seen = _seen(module, {leaf for term in terms.values() for _, leaf in term.places}, run)
        for (block, point), term in terms.items():
            if not _is_local(term, {i: seen[leaf] for i, leaf in term.places}, tolerance):
                raise _refusal(block, point, term.formula)


def _seen(module: nn.Module, places: set[Place], run: Callable[[], Any]) -> dict[Place, Tensor]:
    """What passes some places."""
    found: dict[Place, Tensor] = {}

    def keep(place: Place) -> Callable[[Tensor], None]:
        return lambda h: found.__setitem__(place, h.detach().clone())  # it may be written in place behind

    with tapped(module, [(place, keep(place)) for place in places]) as taps:
        taps.begin()
        run()
    return found


def _is_local(term: Gathered, seen: dict[int, Tensor], tolerance: float) -> bool:
    """Whether scaling what a term is made from scales the term by as much, entry by entry."""
    leaf, batch, token = term.formula.sizes
    leaf = leaf if term.formula.write is None else term.formula.write
    given, made = seen[leaf], term.made_of(seen)
    rows = term.formula.write is not None and given.shape[:-1] != made.shape[:-1] and given.shape[-1] == made.shape[-1]
    generator = torch.Generator().manual_seed(0)
    # Of a write in windows, frames or some of the tokens nothing is asked but that it is linear and keeps dims: its
    # rows are no tokens, and what is added at a token is what is seen there.
    shape = made.shape[-1:] if rows else made.shape
    scale = torch.tensor(_FACTORS)[torch.randint(len(_FACTORS), shape, generator=generator)].to(made)
    if rows:
        other = given * scale.to(given.dtype)
    elif made.numel() == given.numel():
        other = given * scale.reshape(given.shape).to(given.dtype)
    elif given.ndim == made.ndim + 1:
        (streams,) = {0, 1, 2} - {batch, token}
        other = given * scale.unsqueeze(streams).to(given.dtype)
    else:
        return False
    off = (term.made_of(seen | {leaf: other}) - made * scale).abs()
    return bool((off <= tolerance * made.abs().amax()).all())


def _refusal(block: str, point: str, formula: Formula) -> ProofError:
    leaf = formula.leaves[formula.sizes[0] if formula.write is None else formula.write]
    ops = ", ".join(dict.fromkeys(repr(op.name.split(".")[1]) for op in formula.ops))
    return ProofError(
        f"Block {block!r} is not understood: its {point} is not {leaf} scaled entry by entry.",
        f"It is made by {ops}: values are moved to other tokens or dims, summed over them, or scaled by themselves.",
        "Nothing was measured. If the model is your own, make what is added to the stream the output of a module.",
    )
