"""Make tests/golden/schema_N: a small finished run of this schema version. Run once for each new version.

python -m tests.golden.make
"""

from __future__ import annotations

from pathlib import Path

import torch

import massact as ma
from massact.records.results import ScanResult
from massact.records.runinfo import SCHEMA_VERSION
from tests.planted import Plant, Planted

FOLDER = Path(__file__).parent / f"schema_{SCHEMA_VERSION}"


def golden_scan() -> ScanResult:
    """A planted model (hand-built, not evidence about real models), the same every time."""
    torch.manual_seed(11)
    module = Planted(4, 10, 12, [Plant(2, 3, 0, 5, 2500.0), Plant(2, 3, 4, 5, -800.0), Plant(3, 3, 7, 1, 90.0)])
    x = 0.02 * torch.randn(3, 10, 12, generator=torch.Generator().manual_seed(5))
    return ma.scan(ma.load(module, inputs={"x": x}), {"x": x})


if __name__ == "__main__":
    golden_scan().save(FOLDER)
