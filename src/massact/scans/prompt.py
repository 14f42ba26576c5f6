"""One prompt and one layer looked at closely: the paper's Fig. 1, Table 1 and Table 2."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from massact.corpora import Corpus, Source
from massact.corpora import corpus as make_corpus
from massact.models import Model
from massact.positions import tokens_of
from massact.records.answer import Answer
from massact.records.sites import Site
from massact.records.tables import frame
from massact.scans.criteria import Evidence
from massact.stats import Keep, Ranks
from massact.trace import Probe, measure

RANKS = {"top 1": 1, "top 2": 2, "top 3": 3, "top 4": 4, "top 5": 5, "top 10": 10, "top 100": 100,
         "top 1%": 0.01, "top 10%": 0.1, "median": 0.5}  # fmt: skip


def prompt_corpus(model: Model, corpus: Corpus, prompt: str, bos: str) -> Corpus:
    """The prompt as a corpus of one sequence; the first sequence of a corpus that is not text alone.

    Raises:
        UserError: the prompt has no token, or more than the model takes.
    """
    if model.tokenizer is None or set(corpus.inputs) != {"input_ids"}:
        return corpus.head(1)
    source = make_corpus([prompt], bos=bos)
    assert isinstance(source, Source)
    made = source.encode(model.tokenizer, chat_template=corpus.origin.bos == "chat")
    made.require(model.vocabulary, model.context)
    return made


def ranks_table(model: Model, corpus: Corpus, first: Corpus, seen: Evidence, answer: Answer, n: int) -> Any:
    """Values at fixed ranks of |h|: of the prompt (Table 1), and over sequences with their spread (Table 2).

    Top k is the k-th greatest |h|; top p the value at rank ceil(p T D); the signed value is kept, with its dim
    (paper.md 2.1, E2 and E8). The greatest were kept for every sequence by the scan; the other ranks need a sort,
    so they are taken from the first `n` sequences, in a pass that ends at the layer shown.
    """
    rows: list[dict[str, object]] = []
    for stack in answer.stacks:
        if stack.largest is None:  # no finite value, or a site of which only the maxima of tokens are measured
            continue
        site = Site(stack.stack, stack.shown_layer, stack.site)
        here = {"stack": site.stack, "site": site.point, "layer": site.layer}
        rows += [here | {"source": "prompt"} | r for r in _measured_ranks(model, first.head(1), site)]
        tops = seen.candidates
        tops = tops[(tops["stack"] == site.stack) & (tops.site == site.point) & (tops.layer == site.layer)]
        kept = {
            name: (t.value.to_numpy(), t.dim.to_numpy())
            for name, r in RANKS.items()
            if r >= 1 and len(t := tops[tops["rank"] == r])
        }
        rows += [here | {"source": "corpus"} | _rank_row(name, *vd) for name, vd in kept.items()]
        if n > 0:
            few = corpus.head(min(n, corpus.n_sequences))
            rows += [
                here | {"source": "corpus"} | r for r in _measured_ranks(model, few, site) if r["rank"] not in kept
            ]
    return frame("ranks", rows)


def _measured_ranks(model: Model, corpus: Corpus, site: Site) -> list[dict[str, object]]:
    result = measure(model, corpus, [Probe("ranks", str(site), Ranks)]).result("ranks", site)
    return [
        _rank_row(name, result.value[:, i], result.dim[:, i])
        for i, name in enumerate(RANKS)
        if not np.isnan(result.value[:, i]).all()
    ]


def _rank_row(name: str, value: np.ndarray, dim: np.ndarray) -> dict[str, object]:
    known = ~np.isnan(value)
    value, dim = value[known], dim[known]
    return {
        "rank": name,
        "magnitude": float(np.abs(value).mean()),
        "value_mean": float(value.mean()),
        "value_std": float(value.std()),
        "same_dim": Counter(dim.tolist()).most_common(1)[0][1] / len(dim),
        "n_sequences": len(value),
    }


def portrait(model: Model, text: Corpus, answer: Answer) -> dict[str, np.ndarray]:
    """|h| of the prompt before, at and after the layer to show, of the stack with the largest ratio (Fig. 1)."""
    best = max(answer.stacks, key=lambda s: s.largest.ratio if s.largest else 0.0)
    shown = best.shown_layer
    before = (best.onset or shown) - 1
    layers = sorted(
        {layer for layer in (before, shown, best.n_layers) if layer >= (1 if best.site != "resid_post" else 0)}
    )
    probes = [Probe("keep", str(Site(best.stack, layer, best.site)), Keep) for layer in layers]
    measured = measure(model, text, probes)
    values = [measured.result("keep", Site(best.stack, layer, best.site)).values[0] for layer in layers]
    n_tokens = values[0].shape[0]
    read = tokens_of(model, text, best.stack, n_tokens - 1)
    tokens = [read.token(0, t) for t in range(n_tokens)]
    return {
        "magnitude": np.abs(np.stack(values)).astype(np.float32),
        "layers": np.array(layers),
        "tokens": np.array(tokens, dtype=str),
        "stack": np.array(best.stack),
        "site": np.array(best.site),
    }
