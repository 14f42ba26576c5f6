"""Heat maps of one prompt: mean logits and probabilities before, at and after the onset (Sun 2024, Figs. 5 and 6)."""

from __future__ import annotations

import numpy as np
import torch

from massact.corpora import Batch, Corpus
from massact.models import Model
from massact.positions import tokens_of
from massact.records.clusters import passing
from massact.records.errors import MassactError
from massact.records.kinds.scan import ScanResult
from massact.records.sites import Site
from massact.scans import prompt_corpus
from massact.stats.attention_call import Attended
from massact.stats.protocol import PerSequence, Where
from massact.trace import Probe, measure
from massact.verbs.scan import PROMPT

LONGEST = 256  # tokens of a prompt: the maps are T x T


class _Dense(PerSequence):
    """Mean logits and probabilities over heads, (T, T) each, of short sequences: a statistic of attention calls."""

    def update(self, a: Attended, where: Where) -> None:
        """Take the attention call of one sequence."""
        s_HTS, p_HTS = a.dense()
        logits = torch.where(a.sees(), s_HTS, float("nan")).nanmean(0)
        self.rows[where.sequence] = logits.cpu().numpy(), p_HTS.mean(0).cpu().numpy()


def attention_maps(model: Model, corpus: Corpus, scan: ScanResult, notes: list[str]) -> dict[str, np.ndarray]:
    """Maps of the scan's prompt in up to four layers; {} with a note where they cannot be drawn."""
    config = scan.info.config
    stack = _stack_to_show(model, scan)
    if stack is None:
        return {}
    try:
        text = prompt_corpus(model, corpus, config.get("prompt") or PROMPT, config.get("bos") or "auto").head(1)
        batch = _cut(next(iter(text.batches(1))))
        layers = _layers(model, scan, stack)
        probes = [Probe("dense", str(Site(stack, layer, "attention")), _Dense) for layer in layers]
        measured = measure(model, [batch], probes)
    except MassactError as error:
        notes.append(f"No attention maps: {error.what}")
        return {}
    results = [measured.result("dense", Site(stack, layer, "attention"))[batch.sequences[0]] for layer in layers]
    n = results[0][0].shape[0]
    read = tokens_of(model, text, stack, n - 1)
    return {
        "logits": np.stack([r[0] for r in results]).astype(np.float32),
        "probs": np.stack([r[1] for r in results]).astype(np.float32),
        "layers": np.array(layers),
        "tokens": np.array([read.token(0, t) for t in range(n)], dtype=str),
        "stack": np.array(stack),
    }


def _cut(batch: Batch) -> Batch:
    """A prompt of at most `LONGEST` tokens; one with an image is left whole, for all its placeholders."""
    ids = batch.inputs.get("input_ids")
    if ids is None or ids.shape[1] <= LONGEST or any(v.shape != ids.shape for v in batch.inputs.values()):
        return batch
    return Batch({k: v[:, :LONGEST] for k, v in batch.inputs.items()}, batch.sequences, (None,) * len(batch.rows))


def _stack_to_show(model: Model, scan: ScanResult) -> str | None:
    """The stack with the most findings whose attention is seen, else the first that has any attention."""
    seen = [s for s in dict.fromkeys(scan.layers["stack"]) if any(
        a.stack == s and a.point == "attention" for a in model.anatomy.attentions)]  # fmt: skip
    counts = scan.findings["stack"].value_counts()
    return max(seen, key=lambda s: int(counts.get(s, 0))) if seen else None


def _layers(model: Model, scan: ScanResult, stack: str) -> list[int]:
    """Two layers up to the onset, the one that reads it, and a middle one; spread evenly without findings."""
    have = sorted(s.layer for s in model.anatomy.attentions if s.stack == stack and s.point == "attention")
    clusters = passing(scan.clusters[scan.clusters["stack"] == stack])
    if len(clusters):
        onset = int(clusters["onset"].iloc[0])
        wanted = [onset - 1, onset, onset + 1, (onset + 1 + have[-1]) // 2]
    else:
        wanted = [have[0], have[len(have) // 3], have[2 * len(have) // 3], have[-1]]
    return sorted({layer for layer in wanted if layer in have}) or have[:1]
