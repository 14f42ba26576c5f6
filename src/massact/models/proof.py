"""Prove an anatomy on a short input before anything is measured with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from massact.models.inputs import float_dtype
from massact.records.anatomy import Anatomy, Block, Stack
from massact.records.errors import ProofError
from massact.records.sites import Site
from massact.trace import tapped, tensors_in


@dataclass(frozen=True)
class Proof:
    """The numbers of a proof, written into every run.

    Args:
        closure: greatest |start + sum(writes) - end| over all sums of all blocks, each divided by the
            magnitudes of its terms.
        tolerance: what rounding allows in the coarsest dtype seen at any site.
        worst: the block and sum where `closure` was reached.
        n_sums, n_sites: how many equations held, how many sites fired.
        outputs_identical: outputs with taps installed equal those without, bit by bit.
        dtype, device: of the weights.
    """

    closure: float
    tolerance: float
    worst: str
    n_sums: int
    n_sites: int
    outputs_identical: bool
    dtype: str
    device: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def prove(module: nn.Module, anatomy: Anatomy, inputs: dict[str, Any], run: Callable[[dict[str, Any]], Any]) -> Proof:
    """Check an anatomy against the model it was found in.

    For every block and every sum of it, `start + sum(writes) = end` must hold up to rounding:
    |start + sum(writes) - end| <= tol * (|start| + sum|writes| + |end|) for every token and dim; every site
    must fire; and the outputs with taps installed must be bit-identical to those without.

    Args:
        module: the model, in evaluation mode.
        anatomy: from `discover`.
        inputs: keyword arguments for one forward pass, not those that the anatomy was found with.
        run: runs the model on them.

    Raises:
        ProofError: says which block, by how much, and what to do.
    """
    bare = [t.clone() for _, t in tensors_in(run(inputs))]
    sites = anatomy.sites()
    seen: dict[Site, Tensor] = {}

    def keep(site: Site) -> Callable[[Tensor], None]:
        def see(h: Tensor) -> None:
            seen[site] = h.detach().clone()  # later blocks may write into it in place

        return see

    with tapped(module, [(place, keep(site)) for site, place in sites.items()]) as taps:
        taps.begin()
        tapped_out = [t for _, t in tensors_in(run(inputs))]
    for site, place in sites.items():
        if site not in seen:
            raise ProofError(
                f"Site {site} does not fire.",
                f"It was found at {place}, but that call did not happen on a second input.",
                _WHAT_TO_DO,
            )
    # Weights may be of other dtypes than what is added up: a stream in float32 over blocks in bfloat16, 8-bit weights.
    tolerance = 4.0 * max(torch.finfo(h.dtype).eps for h in seen.values())
    worst, where, n_sums = 0.0, "", 0
    for stack in anatomy.stacks:
        n_sums += _joined(stack, seen, tolerance)
        for block in stack.blocks:
            for i in range(len(block.sums)):
                off = _mismatch(stack, block, i, seen)
                n_sums += 1
                if not off <= tolerance:
                    raise _refusal(stack, block, i, off, tolerance)
                if off >= worst:
                    worst, where = off, f"{block.module}: {_equation(block, i)}"
    identical = len(bare) == len(tapped_out) and all(
        torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(bare, tapped_out, strict=True)
    )
    if not identical:
        raise ProofError(
            "The model's outputs change when taps are installed.",
            "It is not deterministic, or it takes another path when it has hooks.",
            "Put it in evaluation mode and fix its random numbers.",
        )
    device = next((str(p.device) for p in module.parameters()), "cpu")
    return Proof(
        worst, tolerance, where, n_sums, len(seen), True, str(float_dtype(module)).removeprefix("torch."), device
    )


_WHAT_TO_DO = (
    "Nothing was measured. If the model is your own, make every write to the residual stream the output of "
    "a module and give the list of blocks with blocks='path'."
)


def _joined(stack: Stack, seen: dict[Site, Tensor], tolerance: float) -> int:
    """Check that every block takes in what the one before gives, plus what is added between; gives how many do.

    Without additions the two must be the same bits: nothing has been computed between them.
    """
    proved = 0
    for before, block in zip(stack.blocks, stack.blocks[1:], strict=False):
        given = seen[Site(stack.name, before.layer, "resid_post")]
        taken = seen[Site(stack.name, block.layer, "resid_pre")]
        if block.changed:  # said in the notes; the two are sites of their own
            continue
        total, size = given.double().reshape(taken.shape), given.double().abs().reshape(taken.shape)
        for name in block.between:
            write = seen[Site(stack.name, block.layer, name)].double().reshape(taken.shape)
            total, size = total + write, size + write.abs()
        allowed = tolerance if block.between else 0.0
        if not block.between:  # a stream that goes on in another dtype is rounded once
            total = given.to(taken.dtype).double().reshape(taken.shape)
        off = (total - taken.double()).abs()
        size = size + taken.double().abs()
        relative = off / size.clamp_min(torch.finfo(torch.float64).tiny)
        if not bool((relative <= allowed).all()):
            raise ProofError(
                f"Block {block.module!r} (layer {block.layer}) does not take in what block {before.module!r} "
                f"(layer {before.layer}) gives: they differ by {float(off.max()):.3g}, {float(relative.max()):.2g} of "
                f"the terms (allowed: {allowed:.1g}).",
                f"{before.places['resid_post']} is not {block.places['resid_pre']}"
                + "".join(f" minus {block.places[n]}" for n in block.between) + ".",
                "Nothing was measured. What happens to the stream between blocks must be seen: write into no view of "
                "it, and make what is added there the output of a module.",
            )
        proved += 1
    return proved


def _mismatch(stack: Stack, block: Block, i: int, seen: dict[Site, Tensor]) -> float:
    """The greatest difference of one sum, relative to the magnitudes of its terms."""
    terms = block.sums[i]

    def value(point: str) -> Tensor:
        return seen[Site(stack.name, block.layer, point)].double()

    end = value(terms.end)
    total = value(terms.start).reshape(end.shape)
    size = total.abs() + end.abs()
    for name in terms.writes:
        write = value(name).reshape(end.shape)
        total, size = total + write, size + write.abs()
    off = (total - end).abs() / size.clamp_min(torch.finfo(torch.float64).tiny)
    return float("nan") if bool(off.isnan().any()) else float(off.max())


def _equation(block: Block, i: int) -> str:
    terms = block.sums[i]
    return f"{' + '.join((terms.start, *terms.writes))} = {terms.end}"


def _refusal(stack: Stack, block: Block, i: int, off: float, tolerance: float) -> ProofError:
    if off != off:
        return ProofError(
            f"Block {block.module!r} gives NaN or Inf on a short random input.",
            f"{_equation(block, i)} cannot be checked.",
            "Check the weights and the dtype: fp16 overflows at 65,504; try bfloat16 or float32.",
        )
    places = "; ".join(f"{p}: {block.places[p]}" for p in (*block.sums[i].writes, block.sums[i].end))
    return ProofError(
        f"Block {block.module!r} (layer {block.layer}) is not understood: {_equation(block, i)} is off by {off:.2g} "
        f"of its terms (allowed: {tolerance:.1g}).",
        f"Places: {places}.",
        _WHAT_TO_DO,
    )
