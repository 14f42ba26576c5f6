"""The equations that a proved anatomy obeys: what a block writes adds up, what one gives the next takes in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from massact.records.anatomy import Block, Stack
from massact.records.errors import ProofError
from massact.records.sites import Site

COARSE = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_ROUND = ("mul", "div", "add", "sub", "mm", "sum")
ROWS = 64  # tokens looked at together: few enough to stay in the cache of a CPU


@dataclass(frozen=True)
class Off:
    """How far an equation is from holding; of no dimension and on the device, so that nothing waits for them.

    Args:
        relative: greatest |sum - end| over the magnitudes of its terms and its end; Inf where the end is NaN or Inf
            although the terms are not.
        absolute: greatest |sum - end|.
        n_skipped: entries left out, whose terms are NaN or Inf or add up to more than the dtype holds.
    """

    relative: Tensor
    absolute: Tensor
    n_skipped: Tensor


@dataclass(frozen=True)
class Equation:
    """`sum of terms = end`, all of them sites.

    Args:
        block: whose equation it is.
        terms, end: its sites.
        before: of an equation between blocks, the block before; a stream to which nothing is added there goes on bit
            by bit, or is rounded once to another dtype.
    """

    block: Block
    terms: tuple[Site, ...]
    end: Site
    before: Block | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        return (*self.terms, self.end)

    def allowed(self, tolerance: float) -> float:
        """What may be missed of the terms: nothing where nothing was computed, more where factors round as well."""
        places = [self.block.places.get(site.point) for site in self.terms]
        formulas = [p.formula for p in places if p is not None and p.formula is not None]
        roundings = sum(any(word in op.name for word in _ROUND) for f in formulas for op in f.ops)
        return tolerance * (1 + roundings / 4) if len(self.terms) > 1 or formulas else 0.0

    def __str__(self) -> str:
        """As it stands in a record: `model.layers.3: resid_pre + attn_out = resid_mid`."""
        behind = "" if self.before is None else f"{self.before.module} "
        return f"{self.block.module}: {behind}{self._words()}"

    def _words(self) -> str:
        return f"{' + '.join(s.point for s in self.terms)} = {self.end.point}"

    def off(self, seen: Mapping[Site, Tensor]) -> Off:
        """By how much it misses.

        Args:
            seen: site -> tensor (..., width); the terms may have other shapes than the end, and as many entries.

        Raises:
            ProofError: a term has another number of entries than the end.
        """
        end = seen[self.end]
        rows = end.reshape(-1, end.shape[-1])
        for site in self.terms:
            if seen[site].numel() != end.numel():
                raise ProofError(
                    f"In block {self.block.module!r} (layer {self.block.layer}) site {site} has "
                    f"{tuple(seen[site].shape)}, site {self.end} {tuple(end.shape)}: they do not add up.",
                    "The model cuts its input into pieces or joins tokens on inputs of this length.",
                    "Nothing was measured. Use shorter sequences (--seq-len).",
                )
        terms = [seen[site].reshape(rows.shape) for site in self.terms]
        if len(terms) == 1:
            terms = [terms[0].to(rows.dtype)]
        # The difference of two numbers of one dtype is zero only where they are equal; sums of numbers of 16 bits are
        # exact in float32 to 2^-16 of what their own rounding allows.
        short = len(terms) == 1 or all(t.dtype.itemsize < 4 for t in (*terms, rows))
        wide = torch.promote_types(rows.dtype, torch.float32) if short else torch.float64
        parts = [_off([t[i : i + ROWS] for t in terms], rows[i : i + ROWS], wide) for i in range(0, len(rows), ROWS)]
        relative, absolute, n_skipped = (torch.stack(x) for x in zip(*parts, strict=True))
        return Off(relative.max(), absolute.max(), n_skipped.sum())

    def refusal(
        self, off: Off, tolerance: float, tokens: int | None = None, seen: Mapping[Site, Tensor] | None = None
    ) -> ProofError:
        """What is said where it does not hold.

        Args:
            tokens: of the sequence of a corpus where it was looked at; None for the short example.
            seen: site -> tensor, where they are still there: what happens to a stream between blocks is read off them.
        """
        block, relative = self.block, float(off.relative)
        size = f"{relative:.2g} of its terms (allowed: {self.allowed(tolerance):.1g})"
        held = "It holds on a short input: on this one the model takes another path. "
        at, why, do = (" on the short example", "", SEEN) if tokens is None else (f" at {tokens} tokens", held, SHORTER)
        happens = None if self.before is None or seen is None else self._happens(seen)
        if self.before is not None and happens is not None:
            return ProofError(
                f"Between block {self.before.module!r} (layer {self.before.layer}) and block {block.module!r} (layer "
                f"{block.layer}) the stream is {happens[0]}: by up to {float(off.absolute):.3g}, {size}.",
                "What is measured behind the one block is not what the next one reads.",
                f"Nothing was measured. {happens[1]}",
            )
        if self.before is not None:
            return ProofError(
                f"Block {block.module!r} (layer {block.layer}) does not take in what block {self.before.module!r} "
                f"(layer {self.before.layer}) gives{at}: they differ by {float(off.absolute):.3g}, {size}.",
                f"{why}{self.before.places['resid_post']} is not {block.places['resid_pre']}"
                + "".join(f" minus {block.places[s.point]}" for s in self.terms[1:])
                + ".",
                "Nothing was measured. What happens to the stream between blocks must be seen: write into no view of "
                "it, and make what is added there the output of a module."
                if tokens is None
                else do,
            )
        places = "; ".join(f"{s.point}: {block.places[s.point]}" for s in self.sites[1:])
        return ProofError(
            f"Block {block.module!r} (layer {block.layer}) is not understood{at}: {self._words()} is off by {size}.",
            f"{why}Places: {places}.",
            do,
        )

    def _happens(self, seen: Mapping[Site, Tensor]) -> tuple[str, str] | None:
        """What is done to the stream on its way, and what to do about it; None where it is neither rounded nor cut."""
        end = seen[self.end]
        total = sum(seen[site].reshape(end.shape).double() for site in self.terms)
        assert isinstance(total, Tensor)
        for dtype in COARSE:
            info = torch.finfo(dtype)
            step = info.eps * (end.double().abs() + info.tiny)
            if info.eps > torch.finfo(end.dtype).eps and torch.equal(end.to(dtype).to(end.dtype), end):
                if bool(((total - end).abs() <= step).all()):
                    name = str(dtype).removeprefix("torch.")
                    do = f"Take the cast out, or hand the stream on in {name} and cast it inside the next block."
                    return f"rounded to {name}", do
        low, high = float(end.min()), float(end.max())
        if len(self.terms) == 1 and torch.equal(total.clamp(low, high).to(end.dtype), end):
            limits = [f"at least {low:.6g}"] if float(total.min()) < low else []
            limits += [f"at most {high:.6g}"] if float(total.max()) > high else []
            return f"cut to {' and '.join(limits)}", "Take out what cuts it, or let it cut nothing here."
        return None


SEEN = (
    "Nothing was measured. If the model is your own, make every write to the residual stream the output of "
    "a module and give the list of blocks with blocks='path'."
)
SHORTER = (
    "Nothing is reported. Use sequences of a length at which it adds up (--seq-len); if the model is your own, make "
    "every write to the residual stream the output of a module; a model in fp16 that clips needs --dtype float32."
)


def _off(terms: list[Tensor], end: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`Off` of some rows, computed in a wider dtype; in place, since new memory costs more than arithmetic."""
    total = terms[0].to(wide, copy=True)
    size, part = total.abs(), torch.empty_like(total)
    for term in terms[1:]:
        total += part.copy_(term)
        size += part.abs_()
    most, tiny = torch.finfo(end.dtype).max, torch.finfo(end.dtype).tiny
    beyond = ~(size <= most)
    off = total.sub_(part.copy_(end)).abs_().masked_fill_(beyond, 0)
    absolute = off.amax()
    # Below the smallest normal number rounding is no longer relative.
    relative = off.div_(size.add_(part.abs_()).clamp_min_(tiny)).masked_fill_(beyond, 0).nan_to_num_(nan=torch.inf)
    return relative.amax(), absolute, torch.count_nonzero(beyond)


def equations_of(stack: Stack) -> list[Equation]:
    """All equations of a stack: of every block, and between blocks that follow one another unchanged."""
    found = []
    for before, block in zip((None, *stack.blocks), stack.blocks, strict=False):

        def site(point: str, block: Block = block) -> Site:
            return Site(stack.name, block.layer, point)

        # What changes the stream between blocks otherwise is said in the notes; the two are sites of their own.
        if before is not None and not block.changed:
            given = Site(stack.name, before.layer, "resid_post")
            found.append(Equation(block, (given, *map(site, block.between)), site("resid_pre"), before))
        for s in block.sums:
            found.append(Equation(block, (site(s.start), *map(site, s.writes)), site(s.end)))
    return found
