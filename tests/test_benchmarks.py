"""A benchmark reaches into the library; what it calls must still be there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.families import build

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


def test_the_scan_that_is_timed_is_a_whole_scan() -> None:
    import scan

    module = build("llama", seed=3)
    with torch.no_grad():
        for dim in (3, 7, 11):
            module.get_input_embeddings().weight[0, dim] = 900.0
    ids = torch.randint(1, 99, (1, 40), generator=torch.Generator().manual_seed(4))
    ids[:, 0] = 0
    for timed in (scan.massact, scan.massact_first):
        seen = timed(module)(ids)
        assert len(seen.layers) == module.config.num_hidden_layers + 1 and len(seen.dims)
    with pytest.raises(AssertionError, match="planted"):
        scan.massact(build("llama", seed=3))(ids)
