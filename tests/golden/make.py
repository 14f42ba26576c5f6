"""Make schema_N, explained_N, intervened_N, classics_N: small finished runs. Run once for each new version.

python -m tests.golden.make
"""

from __future__ import annotations

from pathlib import Path

import torch

import massact as ma
from massact.classics import classics
from massact.corpora import Corpus
from massact.records.classics import CLASSICS_VERSION, Classics
from massact.records.explanation import EXPLAIN_VERSION, Explanation
from massact.records.intervention import INTERVENE_VERSION, Intervention
from massact.records.results import ScanResult
from massact.records.runinfo import SCHEMA_VERSION
from tests.families import build
from tests.planted import Plant, Planted

EXPLAINED = Path(__file__).parent / f"explained_{EXPLAIN_VERSION}"
CLASSIC = Path(__file__).parent / f"classics_{CLASSICS_VERSION}"
INTERVENED = Path(__file__).parent / f"intervened_{INTERVENE_VERSION}"
FOLDER = Path(__file__).parent / f"schema_{SCHEMA_VERSION}"


def golden_scan() -> ScanResult:
    """A planted model (hand-built, not evidence about real models), the same every time."""
    torch.manual_seed(11)
    module = Planted(4, 10, 12, [Plant(2, 3, 0, 5, 2500.0), Plant(2, 3, 4, 5, -800.0), Plant(3, 3, 7, 1, 90.0)])
    x = 0.02 * torch.randn(3, 10, 12, generator=torch.Generator().manual_seed(5))
    return ma.scan(ma.load(module, inputs={"x": x}), {"x": x})


def golden_text_scan() -> tuple[ma.Model, Corpus, ScanResult]:
    """A tiny random Llama whose embedding of token 0 is made large by hand, its text and the scan."""
    module = build("llama", seed=3)
    ids = torch.randint(1, 99, (3, 40), generator=torch.Generator().manual_seed(4))
    ids[:, 0] = 0
    with torch.no_grad():
        module.get_input_embeddings().weight[0, 7] = 900.0
    model, corpus = ma.load(module), ma.corpus(ids)
    return model, corpus, ma.scan(model, corpus, null=False)


def golden_explanation() -> tuple[ScanResult, Explanation]:
    """The explanation of `golden_text_scan`."""
    model, corpus, result = golden_text_scan()
    return result, ma.explain(model, corpus, result)


def golden_intervention() -> tuple[ScanResult, Intervention]:
    """The quartet of edits of `golden_text_scan`."""
    model, corpus, result = golden_text_scan()
    return result, ma.intervene(model, corpus, result, repetition=False)  # greedy ties differ between machines


def golden_classics() -> tuple[ScanResult, Classics]:
    """Two entries that say much in few rows, of `golden_text_scan`."""
    model, corpus, result = golden_text_scan()
    return result, classics(model, corpus, result, which=("norm-growth", "streaming"))


if __name__ == "__main__":
    if not FOLDER.exists():
        golden_scan().save(FOLDER)
    if not EXPLAINED.exists():
        made = golden_explanation()
        made[1].save(made[0].save(EXPLAINED))
    if not INTERVENED.exists():
        edited = golden_intervention()
        edited[1].save(edited[0].save(INTERVENED))
    if not CLASSIC.exists():
        works = golden_classics()
        works[1].save(works[0].save(CLASSIC))
