"""Short texts whose tokens are coloured by the greatest |h| of each, at any layer and point."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from massact.records.kinds.scan import ScanResult
from massact.reports.kinds.scan.portrait import nouns
from massact.reports.parts import TOKEN_LIMIT, Section, Strip, Words
from massact.reports.render.markup import cut
from massact.reports.spelling import counted, listed, visible

SEES = (
    "Each token is coloured by the greatest |h| of all dims of its hidden state, on one log scale for all layers of a "
)
SEES += "point: move the slider to see at which layer a token turns massive, and which do not. Point at a token, or go "
SEES += "with the arrow keys, for its dim, value and ratio to the median."
MOST_VALUES = 2**17  # of a strip, about a megabyte of a page
NO_TOKEN = "(no token)"  # an empty one would be nothing to point at


def text_strip(scan: ScanResult) -> Section | None:
    """The text of the prompt and the beginning of the corpus; of a run without them why; None of one without layers."""
    kept = scan.strip
    if not kept or not np.isfinite(kept["value"]).any():
        return _section(Words([f"Unavailable: {_why(scan)}."])) if len(scan.layers) else None
    value, n_texts = kept["value"], kept["median"].shape[2]
    most = max(1, MOST_VALUES // (value.shape[0] * value.shape[1] * n_texts))
    at = [np.flatnonzero(kept["text"] == k)[:most] for k in range(n_texts)]
    seen = np.concatenate(at)
    size = np.where(np.isfinite(value[:1, :, seen]), np.abs(value[:1, :, seen]), -1.0)
    point, layer, _ = np.unravel_index(int(size.argmax()), size.shape)
    texts = [[(_shown(str(kept["tokens"][i])), int(kept["position"][i])) for i in of] for of in at]
    stack = visible(str(kept["stack"]))
    made = Strip(
        f"{stack + ': ' if stack else ''}Greatest |h| of each token",
        SEES,
        texts,
        [visible(str(name)) for name in kept["points"]],
        [int(of) for of in kept["layers"]],
        value[:, :, seen],
        kept["dim"][:, :, seen],
        kept["median"],
        (int(point), int(layer)),
    )
    said = _left_out(scan, [len(text) for text in texts])
    if n_cut := value.shape[2] - len(seen):
        said.append(f"Not shown for its size: {counted(n_cut, 'token')} more that the run holds in strip.npz.")
    return _section(made, Words(said))


def _shown(token: str) -> str:
    return cut(visible(token), TOKEN_LIMIT) or NO_TOKEN


def _section(*parts: Strip | Words) -> Section:
    return Section("text", "Token by token", parts)


def _why(scan: ScanResult) -> str:
    """Why there is no text to show."""
    of = nouns(scan)
    if scan.strip:
        return "none of the values is finite"
    if of.position != "token":
        return f"the scan read {of.plural()}, not tokens of a text"
    return "the run does not hold it, as those of older versions do not; scan again"


def _left_out(scan: ScanResult, lengths: Sequence[int]) -> list[str]:
    """Which texts these are, and what of the scan they leave out."""
    names = ["The prompt of the scan"] * (len(lengths) > 1) + ["the beginning of its first sequence"]
    told = [f"{name} ({counted(n, 'token')})" for name, n in zip(names, lengths, strict=False)]
    said = [f"{(text := ' and '.join(told))[:1].upper()}{text[1:]}; of each token only its greatest |h|."]
    corpus = scan.info.corpus or {}
    n, total = corpus.get("n_sequences"), corpus.get("n_tokens")
    if isinstance(n, int) and isinstance(total, int):
        said.append(f"Not shown: the rest of the {counted(n, 'sequence')} of {total:,} tokens that were scanned.")
    stacks = [visible(str(name)) for name in dict.fromkeys(scan.layers["stack"]) if name != str(scan.strip["stack"])]
    return said + [f"Not shown either: {listed(stacks)}."] * bool(stacks)
