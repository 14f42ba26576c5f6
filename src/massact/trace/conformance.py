"""A measurement runs the path that was proved: rows, tokens, width and calls of every pass, read off shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from massact.corpora import Batch
from massact.records.anatomy import Place
from massact.records.errors import WorkError
from massact.records.sites import Site

BATCH_FIRST = (
    "Let its blocks take and give (batch, tokens, width): build it with batch_first=True, or transpose only inside the "
    "module that attends, on its way in and on its way out."
)


class Checker(Protocol):
    """Looks at more sites in a few passes; `massact.models.AtLength` is one.

    Args:
        places: the sites that it must see, and where they are.
    """

    places: Mapping[Site, Place]

    def begin(self, batch: Batch) -> bool:
        """Whether the pass of a batch is to be looked at; forgets what a pass that failed half-way has left."""

    def see(self, site: Site, h: Tensor) -> None: ...

    def end(self) -> None:
        """After such a pass; raises where something does not hold."""


class Shapes:
    """The shapes of one pass.

    Args:
        batch: what runs.
        widths: of every stack, the width of its residual stream.
    """

    def __init__(self, batch: Batch, widths: Mapping[str, int]) -> None:
        self.batch, self.widths = batch, widths
        self.first: dict[str, tuple[Site, int]] = {}  # of every stack, the first site of this pass and its tokens

    def check(self, h: Tensor, site: Site, place: Place) -> None:
        """Refuse a tensor whose rows are not the batch's sequences, or whose tokens or width are not its stack's.

        Raises:
            WorkError: rows or tokens would be dropped, or counted under another sequence.
        """
        n = len(self.batch.sequences)
        if h.ndim not in (2, 3) or (h.ndim == 3 and h.shape[0] != n) or (h.ndim == 2 and h.shape[0] % n):
            raise WorkError(
                f"Site {site} has {tuple(h.shape)} for {n} {'sequence' if n == 1 else 'sequences'}: its rows are not "
                f"the sequences of the batch ({place}).",
                "The model puts another axis first, runs several streams, or cuts its input into pieces.",
                f"{BATCH_FIRST} Or choose other sites.",
            )
        if site.point == "logits":
            return
        width = self.widths[site.stack]
        if site.point.startswith("resid") and h.shape[-1] != width:
            raise WorkError(
                f"Site {site} has {h.shape[-1]} dims, its stack {width} ({place}).",
                "The model takes another path on this input than when it was proved.",
                "Choose sites whose width does not change with the input.",
            )
        tokens = h.shape[1] if h.ndim == 3 else h.shape[0] // n
        other, first = self.first.setdefault(site.stack, (site, tokens))
        if tokens != first and "cross" not in site.point:
            raise WorkError(
                f"Site {site} has {tokens} tokens, site {other} of the same pass {first} ({place}).",
                "The model cuts its input into pieces or joins tokens, which it did not do when it was proved.",
                "Use shorter sequences (--seq-len), or choose sites that see all tokens.",
            )


def check_calls(seen: Mapping[str, int], proved: Mapping[str, int], whole: bool) -> None:
    """Refuse a pass that runs a module more or less often than the one that was proved.

    Args:
        seen, proved: "in:module" or "out:module" -> calls; "attention:module" -> attention calls made in it.
        whole: False for a pass that ended at the last site asked for, behind which more calls may come.

    Raises:
        WorkError: names the module.
    """
    for border, n in seen.items():
        known = proved.get(border, n)
        if n > known or (whole and n < known):
            side, _, module = border.partition(":")
            raise WorkError(
                f"Module {module!r} {'attended' if side == 'attention' else 'ran'} {n} times in one pass, {known} when "
                "the model was proved.",
                "How often it does depends on the input: a call beyond those proved would be left out.",
                "Use sequences of a length at which the numbers agree (--seq-len).",
            )
