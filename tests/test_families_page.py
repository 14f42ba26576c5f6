"""docs/families.md: what it says of a sample of families is so today, and the tiny models are what they should be."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, JambaConfig

from recipes.families.shrinking import VOCABULARY, awake, shrunk
from recipes.families.sweep import KINDS, Row, classes_of, paths_of, table, tried

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
ROW = re.compile(r"^\| (\S+) \| (\w+) \| (proved|refused|no example) \| (.*) \|$", re.M)


def _rows() -> list[tuple[str, str, str, str]]:
    """Family, kind, status and what is said of it."""
    found = []
    for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        kind = part.split("\n")[0].lower()
        found += [(family, kind, status, said) for family, _, status, said in ROW.findall(part) if kind in KINDS]
    return found


def _sample() -> list[tuple[str, str, str, str]]:
    """One row in fifty, always the same ones, of those that any change of the code may change."""
    return [row for row in _rows() if zlib.crc32(f"{row[0]} {row[1]}".encode()) % 50 == 7]


@pytest.mark.parametrize("row", _sample(), ids=lambda row: f"{row[0]}-{row[1]}")
def test_a_sample_is_as_the_page_says(row: tuple[str, str, str, str]) -> None:
    family, kind, status, said = row
    found = tried(family, kind, classes_of(family)[kind])
    assert found.status == status
    if status == "proved":
        assert paths_of(found) == said and all(int(stack.split()[-1]) >= 2 for stack in found.stacks.split(", "))


def test_the_page_has_its_figures_from_its_rows() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for kind in KINDS:
        status = [s for _, k, s, _ in _rows() if k == kind]
        ran = status.count("proved") + status.count("refused")
        assert f"| {kind} | {ran} | {status.count('proved')} | {status.count('refused')} |" in text


def test_shares_are_of_families_with_attention() -> None:
    rows = [Row("a", "vision", "A", "proved"), Row("b", "vision", "B", "refused", "x", attends=False),
            Row("c", "vision", "C", "refused", "y | z"), Row("d", "part", "", "part"),
            Row("e", "vision", "E", "no example", "z")]  # fmt: skip
    said = table(rows)
    assert "| vision | 3 | 1 | 2 | 1 | 50 % | 1 |" in said and "y \\| z" in said and "builds: d." in said


def test_every_kind_of_layer_is_kept() -> None:
    """Jamba's layers attend once in eight and have experts once in two: four kinds of layers."""
    small = JambaConfig(**shrunk(JambaConfig()))
    assert set(small.layers_block_type) == {"attention", "mamba"} and small.num_hidden_layers <= 6
    assert (small.vocab_size, small.num_experts_per_tok) == (VOCABULARY, 2) and small.num_experts <= 4


def test_equal_numbers_stay_equal() -> None:
    small = shrunk(GPT2Config())
    assert small["n_layer"] == 2 and small["n_embd"] % small["n_head"] == 0
    assert small["bos_token_id"] == small["eos_token_id"] == VOCABULARY - 1


def test_parameters_that_begin_at_zero_are_awake() -> None:
    module = nn.Linear(4, 4)
    with torch.no_grad():
        module.bias.zero_()
        module.weight.fill_(1e-5)
    assert all(float(p.detach().abs().max()) > 0.01 for p in awake(module).parameters())
