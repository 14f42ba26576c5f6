"""Make tests/golden/schema_N and explained_N: small finished runs of these versions. Run once for each new version.

python -m tests.golden.make
"""

from __future__ import annotations

from pathlib import Path

import torch

import massact as ma
from massact.records.explanation import EXPLAIN_VERSION, Explanation
from massact.records.results import ScanResult
from massact.records.runinfo import SCHEMA_VERSION
from tests.families import build
from tests.planted import Plant, Planted

EXPLAINED = Path(__file__).parent / f"explained_{EXPLAIN_VERSION}"
FOLDER = Path(__file__).parent / f"schema_{SCHEMA_VERSION}"


def golden_scan() -> ScanResult:
    """A planted model (hand-built, not evidence about real models), the same every time."""
    torch.manual_seed(11)
    module = Planted(4, 10, 12, [Plant(2, 3, 0, 5, 2500.0), Plant(2, 3, 4, 5, -800.0), Plant(3, 3, 7, 1, 90.0)])
    x = 0.02 * torch.randn(3, 10, 12, generator=torch.Generator().manual_seed(5))
    return ma.scan(ma.load(module, inputs={"x": x}), {"x": x})


def golden_explanation() -> tuple[ScanResult, Explanation]:
    """A tiny random Llama whose embedding of token 0 is made large by hand, and its explanation."""
    module = build("llama", seed=3)
    ids = torch.randint(1, 99, (3, 40), generator=torch.Generator().manual_seed(4))
    ids[:, 0] = 0
    with torch.no_grad():
        module.get_input_embeddings().weight[0, 7] = 900.0
    model, corpus = ma.load(module), ma.corpus(ids)
    result = ma.scan(model, corpus, null=False)
    return result, ma.explain(model, corpus, result)


if __name__ == "__main__":
    if not FOLDER.exists():
        golden_scan().save(FOLDER)
    if not EXPLAINED.exists():
        made = golden_explanation()
        made[1].save(made[0].save(EXPLAINED))
