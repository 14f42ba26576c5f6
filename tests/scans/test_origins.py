"""Generated tokens beside those of the prompts: planted, and against NumPy on the hidden states. Hand-made weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import massact as ma
from massact.cli import app
from massact.records.kinds.scan import ScanResult
from massact.reports.kinds.scan.origins import draw_origins, origins_in_words
from massact.scans import scanned_corpus
from massact.stats import HiddenStats, Where
from tests.facts import tells
from tests.families import build

T, N, DIM, LARGE = 6, 5, 7, 900.0
OFF = {"null": False, "bos_contrast": False, "rank_sequences": 0}


def marked(says: int) -> torch.nn.Module:
    """Token 0 is massive wherever it stands, and the likeliest next token is always `says`."""
    module = build("llama", seed=3)
    module.generation_config.eos_token_id = None
    with torch.no_grad():
        module.get_input_embeddings().weight[0, DIM] = LARGE
        module.lm_head.weight.zero_()
        if says:  # the model's last norm gives every token one sign at this dim
            module.model.norm.weight[DIM] = 0.0
            module.lm_head.weight[:] = module.lm_head.weight
            module.generation_config.suppress_tokens = [i for i in range(99) if i != says]
    return module


def prompts(n: int = 4) -> torch.Tensor:
    ids = torch.randint(1, 99, (n, T), generator=torch.Generator().manual_seed(4))
    ids[:, 0] = 0
    return ids


def scanned(says: int, **options: Any) -> ScanResult:
    return ma.scan(marked(says), prompts(), generate=N, **OFF, **options)


def row(result: ScanResult, **wanted: Any) -> Any:
    rows = result.origins
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    assert len(rows) == 1, wanted
    return rows.iloc[0]


def test_a_massive_token_that_the_model_writes_is_found_as_generated() -> None:
    result = scanned(says=0)
    found = result.findings
    assert set(found.dim) == {DIM} and {*found[found.origin == "generated"].pos} == set(range(T, T + N))
    assert {*found[found.origin == "prompt"].pos} == {0}
    for layer in range(4):
        mine, control = (row(result, layer=layer, origin=o, position_class="behind") for o in ("generated", "prompt"))
        assert (mine.n_tokens, mine.n_massive, mine.share, mine.n_sequences) == (4 * N, 4 * N, 1.0, 4)
        assert (control.n_tokens, control.n_massive, control.share) == (4 * (T - 1), 0, 0.0)
        assert control.share_high == pytest.approx(0.4899, abs=1e-3), "Wilson of 0 of 4: not zero"
    every = row(result, layer=-1, origin="generated", position_class="behind")
    assert every.n_massive == 4 * N and every.greatest == pytest.approx(LARGE, rel=0.01)
    of = result.clusters.set_index("position_class").n_generated
    assert of["other"] == 4 * N * 4 and of["start"] == 0
    assert tells(origins_in_words(result), 20, "massive", "prompts", "greedily") and draw_origins(result)


def test_where_it_writes_other_tokens_none_is_and_that_is_an_interval() -> None:
    result = scanned(says=5)
    assert {*result.findings.origin} == {"prompt"} and {*result.findings.pos} == {0}
    every = row(result, layer=-1, origin="generated", position_class="behind")
    assert every.n_massive == 0 and (every.share, every.share_low) == (0, pytest.approx(0, abs=1e-12))
    assert every.share_high > 0.4 and every.greatest < 100
    assert tells(origins_in_words(result), "none", "interval")


def test_medians_so_far_and_of_all_are_numpys() -> None:
    """What the table says is what plain forward passes over the same text say."""
    module = marked(0)
    model = ma.load(module)
    result = ma.scan(model, prompts(), generate=N, **OFF)
    text = scanned_corpus(model, ma.corpus(prompts()), result).inputs["input_ids"]
    assert text.shape == (4, T + N)
    with torch.no_grad():
        states = module(text, output_hidden_states=True).hidden_states
    h_LNTD = [s.abs().double().numpy() for s in states[:-1]]  # the last one is behind the norm
    known = result.findings[result.findings.layer < len(h_LNTD)]
    assert len(known) == 4 * (N + 1) * len(h_LNTD)
    for f in known.itertuples():
        h_TD = h_LNTD[f.layer][f.sequence]
        for median, part in ((f.median, h_TD), (f.median_so_far, h_TD[: f.pos + 1])):
            assert median == pytest.approx(np.sort(part.flat)[(part.size - 1) // 2], rel=1e-5)
    for layer, h_NTD in enumerate(h_LNTD):
        mine = row(result, layer=layer, origin="prompt", position_class="behind")
        most_N = h_NTD[:, 1:T].max((1, 2))
        assert mine["max"] == pytest.approx(most_N.mean(), rel=1e-5)
        assert mine.greatest == pytest.approx(most_N.max(), rel=1e-5)
        half = 3.182446 * most_N.std(ddof=1) / 2  # t of three degrees of freedom
        assert (mine.max_low, mine.max_high) == pytest.approx((most_N.mean() - half, most_N.mean() + half), rel=1e-4)


def test_a_saved_run_keeps_its_text_and_does_not_generate_again(tmp_path: Path, monkeypatch: Any) -> None:
    model = ma.load(marked(0))
    result = ma.scan(model, prompts(), generate=N, out=tmp_path / "run", temperature=1.0, seed=3, **OFF)
    monkeypatch.setattr(model.module, "generate", None)
    again = ma.open_run(tmp_path / "run")
    assert len(again.origins) == len(result.origins) and again.info.corpus["packing"]["generated"]["temperature"] == 1
    text = scanned_corpus(model, ma.corpus(prompts()), again)
    assert text.sha256 == result.info.corpus["sha256"] and text.prompts == (T,) * 4
    assert set(ma.explain(model, ma.corpus(prompts()), again).writers["position_class"]) <= {"start", "other"}


def test_a_run_without_generation_says_nothing_of_origins() -> None:
    result = ma.scan(marked(0), prompts(), **OFF)
    assert not len(result.origins) and set(result.findings.origin) == {""} and not result.clusters.n_generated.any()
    assert (
        result.findings.median_so_far.isna().all() and origins_in_words(result) == [] and draw_origins(result) is None
    )


def test_the_command_line_and_verbs_on_its_run(tmp_path: Path) -> None:
    run, out = CliRunner().invoke, tmp_path / "run"
    asked = ["--generate", "4", "--n-sequences", "4", "--seq-len", "16", "--no-null", "--no-bos-contrast"]
    done = run(app, ["scan", *asked, "--out", str(out), "--figures", "none", "--prompt", "The lamp"])
    assert done.exit_code == 0 and tells(done.output, 16, "generated", "interval"), done.output
    made = ma.open_run(out)
    assert {*made.origins.origin} == {"prompt", "generated"} and made.generated["ids"].shape == (4, 20)
    done = run(app, ["explain", str(out), "--figures", "none", "--quiet"])
    assert done.exit_code == 0, done.output
    for wrong in (["--generate", "0"], ["--generate", "5000"], ["--generate", "3", "--checkpoints"]):
        done = run(app, ["scan", *wrong, "--figures", "none"])
        assert done.exit_code and "generate" in f"{done.output} {done.exception}".lower()


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            fresh = isinstance(x, torch.Tensor) and x.numel() * x.element_size() == x.untyped_storage().nbytes()
            self.most = max(self.most, x.numel() if fresh else 0)
        return out


def test_statistics_of_long_outputs_take_bounded_memory() -> None:
    """Thousands of tokens: what is kept grows by three numbers a token, a temporary is one state at most."""
    kept, most, D = {}, {}, 64
    for n in (4096, 16384):
        statistic, h_TD = HiddenStats(top_k=16), torch.randn(n, D, generator=torch.Generator().manual_seed(0))
        with _Largest() as seen:
            statistic.update(h_TD, Where(0))
        kept[n], most[n] = sum(x.nbytes for x in statistic.state().values()), seen.most
    assert kept[16384] - kept[4096] <= 3 * 8 * (16384 - 4096)
    assert most[16384] <= 16384 * D, "never more than one copy of the state of one site"
