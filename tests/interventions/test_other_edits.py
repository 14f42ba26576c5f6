"""An edit that another package adds is found by its name, applied, and stands in the reference beside ours."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

import massact as ma
from massact.interventions.edit_names import EDITS, EditName, Setting, check_name, edit_named, edits
from massact.records import extensions as registry
from massact.records.errors import UserError
from massact.trace import Edit, edited
from tests.families import build


def read(name: str, text: str | None) -> float:
    if text is None or not text.lstrip("-").isdigit():
        raise UserError(f"{name!r} needs a whole number.")
    return float(text)


def shifted(name: str, by: float, setting: Setting) -> Edit:
    return Edit(name, "1.resid_post", lambda h_BTD, batch: h_BTD + by)


SHIFT = EditName("shift=N", "N more everywhere (another package)", shifted, read)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a package with this entry point were installed."""
    entry = EntryPoint("shift", f"{__name__}:SHIFT", "massact.edits")
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == entry.group else [])


def test_an_edit_of_another_package() -> None:
    assert list(edits())[:-1] == list(EDITS) and edits()["shift=N"] is SHIFT
    model = ma.load(build("gpt2"))
    seen: list[Any] = []
    handle = model.module.transformer.h[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        model.module(ids)
        with edited(model, edit_named("shift=3", Setting(model, ()))):
            model.module(ids)
    handle.remove()
    torch.testing.assert_close(seen[1], seen[0] + 3)


def test_its_values_are_checked_and_it_is_told_where_a_name_is_wrong() -> None:
    with pytest.raises(UserError, match="whole number"):
        check_name("shift=x")
    with pytest.raises(UserError, match=r"Unknown edit 'shft=3'.*\n.*shift=N"):
        check_name("shft=3")


def test_it_stands_in_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs"))
    import generate

    assert re.search(r"(?m)^\| `shift=N` \| .*\(another package\) \|$", generate.reference_page())
