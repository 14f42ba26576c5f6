"""The embedded model scanned once, what a quantisation makes ready of it, and a twin for other libraries."""

from __future__ import annotations

from pathlib import Path

import pytest

from massact.quantisation.linears import linears_of
from massact.quantisation.massive_tokens import massive_tokens
from massact.quantisation.roundings import Prepared, calibrate
from massact.quantisation.schemes import scheme
from massact.scans import scan_first
from massact.scans.earlier_scan import Reopened
from tests.quantisation.linear_twin import save_linear_twin

CALIBRATED = ("int8-tensor-static", "int8-tensor-static+exempt", "int8-tensor+hadamard", "int8-tensor+smooth-all",
              "int8-tensor+insert", "int8-token", "int4-group32", "int8-channel", "fp8-none")  # fmt: skip


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the embedded model, with Linear modules."""
    return save_linear_twin(tmp_path_factory.mktemp("twin"))


@pytest.fixture(scope="session")
def scanned() -> Reopened:
    """Eight sequences of 64 tokens."""
    return scan_first(None, None, asked={"seq_len": 64, "n_sequences": 8})


@pytest.fixture(scope="session")
def prepared(scanned: Reopened) -> Prepared:
    """Calibrated on all of them."""
    ready = Prepared(scanned.model, "", linears_of(scanned.model, ""), massive_tokens(scanned.scan, ""))
    return calibrate(ready, scanned.corpus, [scheme(name) for name in CALIBRATED], 8, lambda *_: None)
