"""A statistic from outside of the package: its columns stand in the table of layers, on disk and in a report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import massact as ma
from massact.models import Model
from massact.records import extensions as registry
from massact.records.errors import UserError
from massact.records.kinds.scan import open_run
from massact.stats import Keep, PerSequence, Where
from massact.stats.attention_call import Attended
from massact.trace import Probe, measure
from tests.facts import tells
from tests.families import build


class Parity(PerSequence):
    """Share of positive values."""

    COLUMNS: ClassVar = {"positive": "share of values above zero"}

    def update(self, h_TD: Tensor, where: Where) -> None:
        self.rows[where.sequence] = int((h_TD > 0).sum()), h_TD.numel()

    def columns(self) -> dict[str, float]:
        above, n = np.array(self.in_order()).sum(0)
        return {"positive": above / n}


class Last(PerSequence):
    COLUMNS: ClassVar = {"last_on_first": "attention of the last token on the first"}

    def update(self, a: Attended, where: Where) -> None:
        self.rows[where.sequence] = float(a.probs(torch.tensor([0]), slice(-1, None)).mean())

    def columns(self) -> dict[str, float]:
        return {"last_on_first": float(np.mean(self.in_order()))}


PARITY = Probe("parity", "*.resid_post", Parity)
LAST = Probe("last", "*.attention", Last)
NOWHERE = Probe("nowhere", "*.resid_pots", Last)
IDS = torch.randint(1, 90, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Model:
    return ma.load(build("gpt2"))


def scanned(model: Model, **options: Any) -> Any:
    return ma.scan(model, IDS, null=False, bos_contrast=False, **options)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EntryPoint]]:
    entries: list[EntryPoint] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: [e for e in entries if e.group == group])
    yield entries


def test_its_columns_are_measured_kept_and_reported(model: Model, tmp_path: Path) -> None:
    result = scanned(model, probes=[PARITY, LAST], out=tmp_path / "run")
    kept = measure(model, ma.corpus(IDS), [Probe("keep", "*.resid_post", Keep)])
    wanted = [np.mean(np.stack(kept.result("keep", site).values) > 0) for site in kept.sites("keep")]
    np.testing.assert_allclose(result.layers["positive"], wanted)
    assert np.isnan(result.layers["last_on_first"][0]) and (result.layers["last_on_first"][1:] > 0).all()
    again = open_run(tmp_path / "run")
    for name in ("positive", "last_on_first"):
        np.testing.assert_array_equal(again.layers[name], result.layers[name])
    assert json.loads(json.dumps(again.as_dict()))["layers"][2]["positive"] == pytest.approx(wanted[2])
    ma.report(tmp_path / "run")
    pages = [p.read_text(encoding="utf-8") for p in (tmp_path / "run").rglob("*.html")]
    assert any(Parity.COLUMNS["positive"] in page and "positive" in page for page in pages)
    plain = scanned(model)
    assert not {"positive", "last_on_first"} & set(plain.layers) and len(plain.layers) == len(result.layers)


def test_one_that_cannot_resume_begins_again(model: Model, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "scan" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scanned(model, probes=[PARITY], out=tmp_path / "run", batch_size=1, progress=stop)
    assert not (tmp_path / "run" / "state.npz").exists()
    with pytest.raises(UserError, match="another config"):
        scanned(model, out=tmp_path / "run", resume=True, batch_size=1)
    again = scanned(model, probes=[PARITY], out=tmp_path / "run", resume=True, batch_size=1)
    np.testing.assert_array_equal(again.layers["positive"], scanned(model, probes=[PARITY]).layers["positive"])


def test_installed_packages_add_theirs(model: Model, installed: list[EntryPoint]) -> None:
    group = "massact.statistics"
    installed += [EntryPoint(n, f"{__name__}:{n}", group) for n in ("PARITY", "NOWHERE")]
    installed.append(EntryPoint("loud", "tests.scans.test_extensions:LOUD", "massact.criteria"))
    result = scanned(model, criterion="loud")
    assert "positive" in result.layers and len(result.findings)
    assert tells(result.info.notes, "'nowhere'", "not", "No site")


@pytest.mark.parametrize(
    ("probes", "said"),
    [
        ([NOWHERE], "No site matches"),
        ([Probe("keep", "*.resid_post", Keep)], "gives no columns"),
        ([PARITY, Probe("again", "*.resid_post", Parity)], "'positive', which there is already"),
        ([Probe("two", "*.resid_p*", Parity)], "one site of each layer"),
    ],
)
def test_what_is_refused(model: Model, probes: list[Probe], said: str) -> None:
    with pytest.raises(UserError, match=said):
        scanned(model, probes=probes)
