"""Settings for all tests: offline, quiet, one thread, reproducible."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("massact", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("massact")
_BESIDE = Path(__file__).parents[2] / "shared" / "data"  # real models beside the checkout are used where they lie
if _BESIDE.is_dir():
    os.environ.setdefault("MASSACT_TEST_DATA", str(_BESIDE))
torch.set_num_threads(1)  # many tiny operations: more threads only wait for each other


@pytest.fixture
def real_data() -> Path:
    """Folder with real models, texts and images: `models/`, `text/`, `images/`. Not part of the repository."""
    path = Path(os.environ.get("MASSACT_TEST_DATA", "nowhere"))
    if not (path / "models").is_dir():
        pytest.skip("no real models: set MASSACT_TEST_DATA to a folder that has them (see tests/SKIPS.md)")
    return path
