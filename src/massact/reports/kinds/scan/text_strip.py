"""Short texts whose tokens are coloured by the greatest |h| of each, at any layer and point."""

from __future__ import annotations

import numpy as np

from massact.records.kinds.scan import ScanResult
from massact.reports.parts import TOKEN_LIMIT, Section, Strip, Words
from massact.reports.render.markup import cut
from massact.reports.spelling import visible

SEES = (
    "Each token is coloured by the greatest |h| of all dims of its hidden state, on one log scale for all layers of a "
)
SEES += "point: move the slider to see at which layer a token turns massive, and which do not. Point at a token, or go "
SEES += "with the arrow keys, for its dim, value and ratio to the median."


def text_strip(scan: ScanResult) -> Section | None:
    """The text of the prompt and the beginning of the corpus; None for a run without them."""
    kept = scan.strip
    if not kept or not np.isfinite(kept["value"]).any():
        return None
    size = np.where(np.isfinite(kept["value"]), np.abs(kept["value"]), -1.0)
    point, layer, _ = np.unravel_index(int(size[:1].argmax()), size.shape)
    tokens = [cut(visible(str(token)), TOKEN_LIMIT) for token in kept["tokens"]]
    texts = [
        [(tokens[i], int(kept["position"][i])) for i in np.flatnonzero(kept["text"] == k)]
        for k in range(kept["median"].shape[2])
    ]
    stack = visible(str(kept["stack"]))
    made = Strip(
        f"{stack + ': ' if stack else ''}Greatest |h| of each token",
        SEES,
        texts,
        [visible(str(name)) for name in kept["points"]],
        [int(of) for of in kept["layers"]],
        kept["value"],
        kept["dim"],
        kept["median"],
        (int(point), int(layer)),
    )
    said = f"The prompt of the scan, and the first {len(texts[-1]):,} tokens of its first sequence."
    return Section("text", "Token by token", [made, *[Words([said])] * (len(texts) > 1)])
