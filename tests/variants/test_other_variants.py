"""Attention variants and remedies that another package adds are found by name, applied, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import massact as ma
from massact.records import extensions as registry
from massact.records.errors import UserError
from massact.variants.application import apply_variant
from massact.variants.calls import Call, Dims, Init, Variant
from massact.variants.registry import VARIANTS, softmax, variants
from massact.variants.remedies import Remedy, apply_remedy, remedies
from tests.families import build


def halves(call: Call, params: Any, **_: Any) -> Any:
    out, lse = softmax(call)
    return out * params["half"][:, None, None].to(out.dtype), lse


def half(dims: Dims, **_: Any) -> dict[str, Init]:
    return {"half": Init((dims.H,), constant=0.5)}


def doubled(model: nn.Module) -> int:
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    return 1


HALVED = Variant("halved", "another package", "softmax(z) v / 2", "1", halves, half)
DOUBLED = Remedy("doubled", "another package", "2 x", doubled)
TWICE = Variant("kv-bias", "another package", "", "1", halves)


def named(group: str, name: str) -> EntryPoint:
    return EntryPoint(name, f"{__name__}:{name}", group)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EntryPoint]]:
    """As if packages with these entry points were installed."""
    entries = [named("massact.variants", "HALVED"), named("massact.remedies", "DOUBLED")]
    monkeypatch.setattr(registry, "entry_points", lambda group: [e for e in entries if e.group == group])
    yield entries


def test_a_variant_of_another_package(installed: list[EntryPoint], tmp_path: Path) -> None:
    assert list(variants())[:-1] == list(VARIANTS) and variants()["halved"] is HALVED
    ids = torch.randint(1, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    plain, changed = build("llama"), apply_variant(build("llama"), "halved")
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.5)  # the same by hand
        torch.testing.assert_close(changed(ids).logits, plain(ids).logits)
        changed.save_pretrained(tmp_path)
        torch.testing.assert_close(ma.load(str(tmp_path)).module(ids).logits, changed(ids).logits)


def test_a_remedy_of_another_package(installed: list[EntryPoint]) -> None:
    assert remedies()["doubled"] is DOUBLED
    before = build("llama").get_input_embeddings().weight
    assert torch.equal(apply_remedy(build("llama"), "doubled").get_input_embeddings().weight, 2 * before)


def test_one_that_is_called_like_another_is_refused(installed: list[EntryPoint]) -> None:
    installed.append(named("massact.variants", "TWICE"))
    with pytest.raises(UserError, match="no Variant"):
        apply_variant(build("llama"), "kv-bios")
