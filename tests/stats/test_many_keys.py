"""Uniform heads, and chosen keys that are most of a sequence, against the formulas of `test_heads`."""

from __future__ import annotations

import numpy as np
import pytest

from massact.stats.heads import HeadOptions, Targets
from tests.stats.test_heads import KINDS, Kind, attention, calls, entropy_error, measured, naive_head


def test_uniform_head_on_the_first_key_is_the_harmonic_number() -> None:
    """(H_T - 1) / (T - 1) over the queries behind position 0: about ln T / T."""
    got = measured([attention(T, T, Kind()) for T in (2, 9, 40)], Targets({}, {}, {}), HeadOptions(bias=False))
    for i, T in enumerate((2, 9, 40)):
        want = sum(1 / (t + 1) for t in range(1, T)) / (T - 1)
        np.testing.assert_allclose(got.per_head["mass_first_uniform"][i], want, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_many_chosen_keys_in_blocks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tokens of a sequence chosen, a few queries at a time: the same numbers."""
    many = Targets({0: [t for t in range(40) if t % 5 and t != 1], 3: list(range(33))}, {0: [0, 1, 5]}, {})
    data = calls(KINDS[kind])
    want = measured(data, many)
    monkeypatch.setattr("massact.stats.attention_call._ROW_VALUES", 300)
    monkeypatch.setattr("massact.stats.heads.LARGEST", 300)
    got = measured(data, many)
    for i, a in enumerate(data):
        for name, naive in naive_head(a, i, many).items():
            atol = entropy_error(a) if name == "entropy" else 2e-6
            np.testing.assert_allclose(got.per_head[name][i], naive, rtol=2e-5, atol=atol, err_msg=f"{name} {i}")
    assert np.isnan(got.per_head["mass_findings"][3]).all(), "no query is left that is none of them"
    for key, x in want.parts.items():
        np.testing.assert_allclose(got.parts[key], x, rtol=1e-4, atol=1e-6)
    known = ~np.isnan(want.residual)
    assert (got.residual[known] < 5e-6).all() and (np.isnan(got.residual) == ~known).all()
