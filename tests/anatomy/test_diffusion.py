"""Diffusion transformers: gates computed from a timestep, scans told apart by it, and denoising language models."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import massact as ma
from massact.records.errors import UserError
from massact.reports import answer_in_words, show
from massact.reports.spelling import cell
from massact.trace import recorded
from tests.facts import each, tells

SIZES = dict(num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=3, sample_size=8,
             patch_size=2)  # fmt: skip
LATENTS = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([10, 40])}
# name -> (class of diffusers, its arguments, what it takes beside latents)
PIPES: dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]] = {
    "dit": ("DiTTransformer2DModel", SIZES | dict(num_embeds_ada_norm=50), {"class_labels": torch.tensor([3, 7])}),
    "pixart": ("PixArtTransformer2DModel", SIZES | dict(cross_attention_dim=32, caption_channels=16,
                                                        use_additional_conditions=False),
               {"encoder_hidden_states": torch.randn(2, 7, 16)}),
    "sd3": ("SD3Transformer2DModel", SIZES | dict(joint_attention_dim=24, caption_projection_dim=32,
                                                  pooled_projection_dim=16, pos_embed_max_size=8),
            {"encoder_hidden_states": torch.randn(2, 7, 24), "pooled_projections": torch.randn(2, 16)}),
}  # fmt: skip


def pipe(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny random transformer of diffusers whose gates are not zero, as they are before training, and an example."""
    diffusers = pytest.importorskip("diffusers")
    kind, sizes, more = PIPES[name]
    torch.manual_seed(0)
    module = getattr(diffusers, kind)(**sizes).eval()
    for p in module.parameters():
        if bool((p == p.flatten()[0]).all()):
            p.data.add_(0.1 * torch.randn_like(p))
    return module, LATENTS | more


@pytest.mark.parametrize("name", PIPES)
def test_transformers_of_diffusers_are_proved(name: str) -> None:
    module, example = pipe(name)
    model = ma.load(module, inputs=example)
    # Images and text in two streams that attend to one another: each of them is a stack; the last block gives no text.
    stacks = {stack.name: stack.n_layers for stack in model.anatomy.stacks}
    assert stacks == ({"hidden_states": 3, "encoder_hidden_states": 2} if name == "sd3" else {"": 3})
    block = model.anatomy.stacks[0].blocks[1]
    assert block.places["attn_out"].formula is not None and block.places["mlp_out"].formula is not None
    assert [s.end for s in block.sums][-1] == "resid_post" and model.anatomy.stacks[0].n_layers == 3
    assert model.anatomy.stacks[0].others == 0


def test_a_second_list_of_blocks_is_not_passed_over_in_silence() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    module = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    example = {
        "hidden_states": torch.randn(2, 16, 4), "timestep": torch.tensor([0.1, 0.4]), "img_ids": torch.zeros(16, 3),
        "encoder_hidden_states": torch.randn(2, 7, 24), "pooled_projections": torch.randn(2, 16),
        "txt_ids": torch.zeros(7, 3),
    }  # fmt: skip
    anatomy = ma.load(module, inputs=example).anatomy
    assert {stack.path for stack in anatomy.stacks} == {"transformer_blocks"}
    assert any(note.startswith("single_transformer_blocks") for note in anatomy.left_out)


class Denoiser(nn.Module):
    """A transformer whose blocks are gated by a timestep; above a timestep one MLP writes a massive activation."""

    class Block(nn.Module):
        def __init__(self, put: float) -> None:
            super().__init__()
            self.norm, self.mlp, self.gate = nn.LayerNorm(32), Put(put), nn.Linear(8, 32)

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            self.mlp.time = time[:, 0]
            return x + self.gate(time).unsqueeze(1) * self.mlp(self.norm(x))

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.enter, self.embed = nn.Linear(5, 32), nn.Linear(1, 7)
        self.blocks = nn.ModuleList(self.Block(put) for put in (0.0, 1e5, 0.0, 0.0))

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        t = timestep.float()[:, None] / 1000
        time, x = torch.cat([t, self.embed(t)], 1), self.enter(latents)
        for block in self.blocks:
            x = block(x, time)
        return x


class Put(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.linear, self.value, self.time = nn.Linear(32, 32), value, torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        out[:, 3, 7] += self.value * (self.time > 0.5)
        return out


@pytest.fixture(scope="module")
def denoised() -> tuple[Any, Any]:
    """A loaded denoiser, and what it is called with in four steps from noise, three latents at a time."""
    module = Denoiser().eval()
    model = ma.load(module, inputs={"latents": torch.randn(2, 13, 5), "timestep": torch.tensor([900, 100])})

    def steps() -> None:
        x = torch.randn(3, 13, 5)
        for t in (900, 700, 400, 100):
            with torch.no_grad():
                x = x - 0.1 * module(x, timestep=torch.tensor(t).expand(3))[..., :5]

    return model, recorded(module, steps)


def test_calls_become_sequences(denoised: tuple[Any, Any]) -> None:
    _, corpus = denoised
    assert corpus.n_sequences == 12 and set(corpus.inputs) == {"latents", "timestep"}
    assert corpus.inputs["timestep"].tolist() == [900] * 3 + [700] * 3 + [400] * 3 + [100] * 3


def test_scan_by_timestep(denoised: tuple[Any, Any], tmp_path: Path) -> None:
    """Massive above the timestep that it was planted at, at its layer, position and dim; numbers as by hand."""
    model, corpus = denoised
    scan = ma.scan(model, corpus, by="timestep", null=False)
    table = scan.by_input
    found = table[table["n_findings"] > 0]
    assert set(found["value"]) == {900.0, 700.0} and set(found["layer"]) == {2, 3, 4} and set(found["dim"]) == {7}
    assert set(scan.findings["pos"]) == {3}
    with torch.no_grad():
        x = model.module.enter(corpus.inputs["latents"])
        t = corpus.inputs["timestep"].float()[:, None] / 1000
        time = torch.cat([t, model.module.embed(t)], 1)
        for block in model.module.blocks[:2]:
            x = block(x, time)
    wanted = x.abs().flatten(1).max(1).values.reshape(4, 3).mean(1).numpy()
    mine = table[table["layer"] == 2].set_index("value")["top1"]
    assert np.allclose([mine[v] for v in (900, 700, 400, 100)], wanted, rtol=1e-5)
    scan.save(tmp_path / "run")
    again = ma.open_run(tmp_path / "run")
    assert again.by_input.equals(table) and again.info.config["by"] == "timestep"
    said = answer_in_words(again)
    assert tells(said, "timestep", 900, 700)
    console = Console(file=io.StringIO(), width=80)
    show(again, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    best = table[table["value"] == 700].sort_values("ratio").iloc[-1]
    assert re.search(rf"700 +{best['layer']} +{re.escape(cell(best['top1']))}", text)
    report = Path(ma.report(tmp_path / "run")).read_text(encoding="utf-8")
    assert "timestep" in report


def test_writers_carry_the_gate(denoised: tuple[Any, Any]) -> None:
    """What the MLP adds is its output times the gate of that timestep: the account adds up."""
    model, corpus = denoised
    scan = ma.scan(model, corpus, null=False)
    writers = ma.explain(model, corpus, scan).writers
    up = writers[writers["role"] == "up"]
    assert set(up["layer"]) == {2} and set(up["submodule"]) == {"mlp_out"} and set(up["dim"]) == {7}


@pytest.mark.parametrize(
    ("by", "facts"),
    [("time", ("no input", "timestep")), ({"a": [1.0]}, ("one number",)), ({"a": [float("nan")] * 12}, ("NaN",)),
     ({"a": [1.0] * 12, "b": [1.0] * 12}, ("2 things",)), ("latents", ("one number",))],
)  # fmt: skip
def test_what_sequences_cannot_be_told_apart_by(denoised: tuple[Any, Any], by: Any, facts: tuple[str, ...]) -> None:
    model, corpus = denoised
    with pytest.raises(UserError, match=each(*facts)):
        ma.scan(model, corpus, by=by, null=False)


def test_calls_that_are_no_corpus(denoised: tuple[Any, Any]) -> None:
    module = denoised[0].module
    with pytest.raises(UserError, match="not called"):
        recorded(module, lambda: None)

    def uneven() -> None:
        for n in (5, 6):
            module(torch.randn(1, n, 5), torch.tensor([1]))

    with pytest.raises(UserError, match="different shapes"), torch.no_grad():
        recorded(module, uneven)


class Stepped(nn.Module):
    """Takes its step as a Python number, and more that has no rows."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, latents: Any, step: Any, scale: float = 1.0, table: Any = None, return_dict: bool = True) -> Any:
        return self.inside(latents, torch.as_tensor(step).expand(len(latents))) * scale


def test_numbers_of_calls_are_given_to_rows_and_what_is_left_out_is_told(denoised: tuple[Any, Any]) -> None:
    module, latents = Stepped(denoised[0].module), denoised[1].inputs["latents"][:2]

    def run(*steps: int, **more: Any) -> Any:
        return recorded(module, lambda: [module(latents, step, return_dict=False, **more) for step in steps])

    with torch.no_grad():
        assert run(900, 30).inputs["step"].tolist() == [900, 900, 30, 30]
        assert run(5).inputs["step"].tolist() == [5, 5] and not run(5, scale=1.0).origin.source
        corpus = run(900, 30, scale=7.5, table=torch.zeros(9, 4))
        other = run(900, 900, scale=2.0)  # the same in all calls, and needed
    assert other.inputs["step"].tolist() == [900] * 4
    assert set(corpus.inputs) == {"latents", "step"}
    scan = ma.scan(ma.load(module, inputs=dict(corpus.inputs)), corpus, by="step", null=False)
    assert sorted(set(scan.by_input["value"])) == [30, 900]
    (note,) = tells(scan.info.notes, "scale=7.5", "table (9, 4)")
    assert not tells(note, "return_dict")


def test_calls_inside_calls_and_calls_that_fail(denoised: tuple[Any, Any]) -> None:
    module, corpus = denoised[0].module, denoised[1]
    given, inner = {name: x[:3] for name, x in corpus.inputs.items()}, list[Any]()

    def run() -> None:
        module(**given)
        inner.append(recorded(module, lambda: module(**given)))

    with torch.no_grad():
        outer = recorded(module, run)
        assert (outer.n_sequences, inner[0].n_sequences) == (6, 3)
        with pytest.raises(KeyError):
            recorded(module, lambda: {}["nothing"])
    assert not module._forward_pre_hooks
    with pytest.raises(UserError, match="called"):
        recorded(module, corpus)  # type: ignore[arg-type]


class Unnamed(Stepped):
    """Hands on whatever it is given."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inside(*args, **kwargs)


def test_inputs_without_names_are_refused_and_keywords_are_taken(denoised: tuple[Any, Any]) -> None:
    module, given = Unnamed(denoised[0].module), {name: x[:2] for name, x in denoised[1].inputs.items()}
    with torch.no_grad():
        with pytest.raises(UserError, match="no names"):
            recorded(module, lambda: module(*given.values()))
        assert set(recorded(module, lambda: module(**given)).inputs) == set(given)


def test_a_denoising_language_model_by_its_share_of_masked_tokens() -> None:
    """Attention without a causal mask over text with masks (as LLaDA): what matters is how many tokens are masked."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                                     intermediate_size=56)  # fmt: skip
    module = transformers.BertForMaskedLM(config).eval()
    ids, share = torch.randint(5, 99, (12, 16)), torch.tensor([0.25, 0.5, 1.0]).repeat_interleave(4)
    masked = torch.arange(16)[None] < (16 * share)[:, None]
    corpus = ma.corpus(ids.masked_fill(masked, 4))
    scan = ma.scan(module, corpus, by={"masked": share.tolist()}, null=False)
    assert sorted(scan.by_input["value"].unique()) == [0.25, 0.5, 1.0]
    of_all = scan.layers.set_index(["site", "layer"])["top1"]
    means = scan.by_input.groupby(["site", "layer"])["top1"].mean()
    assert np.allclose(of_all.loc[means.index], means)
