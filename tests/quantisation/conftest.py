"""A model that the libraries can quantise."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.quantisation.linear_twin import save_linear_twin


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the embedded model, with Linear modules."""
    return save_linear_twin(tmp_path_factory.mktemp("twin"))
