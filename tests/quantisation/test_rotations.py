"""Rotations: orthogonal, all entries of one size, and in blocks where no Hadamard matrix is known."""

from __future__ import annotations

import pytest
import torch

from massact.quantisation.rotations import rotation


@pytest.mark.parametrize("width", [96, 128, 576, 640, 1536, 2048])
def test_one_dim_is_spread_evenly_and_comes_back(width: int) -> None:
    turn = rotation(width, 0)
    whole = turn(torch.eye(width))
    assert turn.block == width and len(turn.a_AA) + len(turn.b_BB) < width // 2
    torch.testing.assert_close(whole @ whole.T, torch.eye(width), rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.abs(), torch.full((width, width), width**-0.5), rtol=1e-5, atol=0)
    x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(turn(x), x @ whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turn.back(turn(x)), x, rtol=1e-4, atol=1e-5)
    assert not torch.equal(rotation(width, 1)(x), turn(x)) and torch.equal(rotation(width, 0)(x), turn(x))


def test_where_no_matrix_is_known_blocks_are_mixed() -> None:
    turn = rotation(46, 0)
    assert turn.block == 2
    whole = turn(torch.eye(46))
    torch.testing.assert_close(whole @ whole.T, torch.eye(46), rtol=0, atol=1e-6)
    assert int((whole.abs() > 1e-6).sum()) == 46 * 2
