"""What the tests of reports share."""

from __future__ import annotations

import pytest
import synthetic

from massact.records.kinds.scan import ScanResult


@pytest.fixture(params=sorted(synthetic.EVERY))
def every(request: pytest.FixtureRequest) -> ScanResult:
    """Every synthetic result in turn."""
    return synthetic.EVERY[request.param]()
