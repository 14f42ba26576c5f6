"""What `massact train` does last: scan and explain the model that it trained, over windows that it held out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from massact.records.errors import UserError
from massact.records.kinds.training import Trained

MOST_WINDOWS = 24
MOST_BYTES = 1 << 27  # of a portrait of all layers
PROMPT = "Summer is warm. Winter is cold.\n"  # of Fig. 9 of Sun 2024


def scan_trained(out: Path, config: Any, data: Any, progress: Callable[..., None]) -> Path:
    """Scan and explain OUT/model over held-out windows into OUT/scan, with figures; what is done is kept.

    Args:
        out: run directory of a finished training.
        config: its `TrainConfig`.
        data: as it was given to the training; of text the tokens in OUT/data are read instead.
        progress: called with (stage, done, total).

    Returns:
        The run directory of the scan.

    Raises:
        MassactError: the model cannot be loaded, scanned or explained.
    """
    from massact.explanations import explain
    from massact.models import load
    from massact.records.kinds.explanation import Explanation
    from massact.reports import draw
    from massact.scans import scan

    place = out / "scan"
    if _whole(out, place):
        return place
    corpus = held_out(out, config, data)
    model = load(str(out / "model"), device=config.device)
    result = scan(model, corpus, out=place, resume=True, progress=progress, null=False, bos_contrast=False,
                  prompt=_prompt(model, corpus))  # fmt: skip
    _all_layers(model, corpus, result, place)
    draw(result, place)
    if Explanation.open(place) is None:
        explanation = explain(model, corpus, result, progress=progress)
        explanation.save(place)
        draw(explanation, place)
    return place


def _whole(out: Path, place: Path) -> bool:
    """Whether the trained model has been scanned and explained already; the directory may have moved since."""
    from massact.records.kinds.explanation import Explanation
    from massact.records.kinds.training import Trained
    from massact.records.run import read_info

    if not (place / "run.json").is_file() or Explanation.open(place) is None:
        return False
    done, info = Trained.open(out), read_info(place)
    hashes = {done.info.model.get("weights_sha256") if done is not None else None, info.model.get("weights_sha256")}
    return info.status == "ok" and len(hashes) == 1


def held_out(out: Path, config: Any, data: Any, n: int = MOST_WINDOWS) -> Any:
    """A few of the windows (images) that a training did not see, as a corpus: the same for every seed.

    Raises:
        UserError: the training's tokens are no longer there.
    """
    import numpy as np
    import torch

    from massact.corpora import corpus
    from massact.records.kinds.training import Trained
    from massact.training.data import Pictures, Windows, open_tokens, read_pictures, split

    if config.images:
        images, labels = read_pictures(data)
        cut = len(images) - max(1, round(config.val_share * len(images)))
        n = min(n, config.eval_windows, len(images) - cut)
        held: Any = Pictures(images[cut:], labels[cut:], n)
        name = "pixel_values"
    else:
        done: Trained | None = Trained.open(out)
        wanted = done.info.corpus.get("tokens_sha256") if done is not None else None
        files = (open_tokens(file) for file in sorted((out / "data").glob("tokens-*.bin")))
        tokens = next((t for t in files if t is not None and t.header.tokens_sha256 == wanted), None)
        if tokens is None:
            raise UserError(f"The tokens of the training are not in {out / 'data'}.",
                            do=f"Scan another text: massact scan {out / 'model'} --corpus FILE")  # fmt: skip
        ids = split(tokens, config.val_share)[1]
        # No more windows than the held-out part has without much overlap.
        n = min(n, config.eval_windows, max(1, (len(ids) - 1) // config.seq_len))
        held, name = Windows(np.asarray(ids), config.seq_len, n, 0, "even"), "input_ids"
    made = corpus({name: torch.stack([held[i][name] for i in range(n)])})
    return dataclasses.replace(made, name="held-out images" if config.images else "held-out text")


def _all_layers(model: Any, corpus: Any, result: Any, place: Path) -> None:
    """Add the layers that a portrait leaves out, after its own, so that runs can be compared at the same layer."""
    import numpy as np

    from massact.records.sites import Site
    from massact.records.tables import save_arrays
    from massact.scans import prompt_corpus
    from massact.stats import Keep
    from massact.trace import Probe, measure

    known = result.portrait
    if not known:
        return
    stack, point = str(known["stack"]), str(known["site"])
    rows = result.layers[(result.layers["stack"] == stack) & (result.layers["site"] == point)]
    left = sorted({int(x) for x in rows["layer"]} - {int(x) for x in known["layers"]})
    if not left or (len(left) + 3) * known["magnitude"][0].nbytes > MOST_BYTES:
        return
    text = prompt_corpus(model, corpus, result.info.config["prompt"], "auto")
    sites = [Site(stack, layer, point) for layer in left]
    measured = measure(model, text, [Probe("keep", str(site), Keep) for site in sites])
    more = np.abs(np.stack([measured.result("keep", site).values[0] for site in sites])).astype(np.float32)
    result.portrait = known | {"magnitude": np.concatenate([known["magnitude"], more]),
                               "layers": np.concatenate([known["layers"], np.array(left)])}  # fmt: skip
    save_arrays(place / "portrait.npz", result.portrait)


def _prompt(model: Any, corpus: Any) -> str:
    """The prompt of Fig. 9 where the model has room for it, else the usual one, which may be left out with a note."""
    from massact.scans import prompt_corpus
    from massact.verbs.scan import PROMPT as usual

    try:
        prompt_corpus(model, corpus, PROMPT, "auto")
    except UserError:
        return usual
    return PROMPT
