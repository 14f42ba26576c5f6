"""Prove an anatomy on a short input before anything is measured with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from massact.anatomy.equations import SEEN, equations_of
from massact.anatomy.examples import float_dtype
from massact.anatomy.locality import prove_local
from massact.records.anatomy import Anatomy
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
        calls: "in:module" or "out:module" -> how often that border of a module was passed in one pass;
            "attention:module" -> how often it attended (of `with_attention`); in no run.
    """

    closure: float
    tolerance: float
    worst: str
    n_sums: int
    n_sites: int
    outputs_identical: bool
    dtype: str
    device: str
    calls: dict[str, int] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "calls"}


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
    seen, calls, tapped_out = _watched(module, anatomy, lambda: run(inputs))
    # Weights may be of other dtypes than what is added up: a stream in float32 over blocks in bfloat16, 8-bit weights.
    tolerance = 4.0 * max(torch.finfo(h.dtype).eps for h in seen.values())
    worst, where, equations = 0.0, "", [e for stack in anatomy.stacks for e in equations_of(stack)]
    for equation in equations:
        off = equation.off(seen)
        if int(off.n_skipped):
            raise ProofError(
                f"Block {equation.block.module!r} gives NaN or Inf on a short random input.",
                f"{equation} cannot be checked.",
                "Check the weights and the dtype: fp16 overflows at 65,504; try bfloat16 or float32.",
            )
        if not float(off.relative) <= equation.allowed(tolerance):
            raise equation.refusal(off, tolerance, seen=seen)
        if float(off.relative) >= worst:
            worst, where = float(off.relative), str(equation)
    prove_local(module, anatomy, lambda: run(inputs), tolerance)
    identical = len(bare) == len(tapped_out) and all(
        torch.equal(a, b) or (a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))
        for a, b in zip(bare, tapped_out, strict=True)
    )
    if not identical:
        raise ProofError(
            "The model's outputs change when taps are installed.",
            "It is not deterministic, or it takes another path when it has hooks.",
            "Put it in evaluation mode and fix its random numbers.",
        )
    device = next((str(p.device) for p in module.parameters()), "cpu")
    dtype = str(float_dtype(module)).removeprefix("torch.")
    return Proof(worst, tolerance, where, len(equations), len(seen), True, dtype, device, calls)


def _watched(
    module: nn.Module, anatomy: Anatomy, run: Callable[[], Any]
) -> tuple[dict[Site, Tensor], dict[str, int], list[Tensor]]:
    """What every site of a pass holds, how often each of their borders was passed, and what the pass gives."""
    sites = anatomy.sites()
    seen: dict[Site, Tensor] = {}

    def keep(site: Site) -> Callable[[Tensor], None]:
        def see(h: Tensor) -> None:
            seen[site] = h.detach().clone()  # later blocks may write into it in place

        return see

    with tapped(module, [(place, keep(site)) for site, place in sites.items()]) as taps:
        taps.begin()
        out = [t for _, t in tensors_in(run())]
    for site, place in sites.items():
        if site not in seen:
            raise ProofError(
                f"Site {site} does not fire.",
                f"It was found at {place}, but that call did not happen on a second input.",
                SEEN,
            )
    return seen, dict(taps.calls), out
