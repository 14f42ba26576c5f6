"""Prompts that a model goes on with: against a loop of plain forward passes, and what is refused. Random weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import massact as ma
from massact.corpora import Corpus
from massact.positions import continued
from massact.records.errors import UserError
from tests.families import build

T, N = 6, 5


def ids(seed: int = 0, n: int = 3, length: int = T) -> Tensor:
    return torch.randint(1, 99, (n, length), generator=torch.Generator().manual_seed(seed))


def prompts(rows: Tensor, mask: Tensor | None = None) -> Corpus:
    given = {"input_ids": rows} | ({} if mask is None else {"attention_mask": mask})
    made = ma.corpus(given)
    assert isinstance(made, Corpus)
    return made


@torch.no_grad()
def by_hand(module: nn.Module, row: Tensor, n: int) -> list[int]:
    """Greedy, without a cache, one forward pass over everything for each token."""
    for _ in range(n):
        row = torch.cat([row, module(row[None]).logits[0, -1].argmax()[None]])
    return row.tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bloom", "gpt_oss"])
def test_greedy_is_the_likeliest_token_every_time(family: str) -> None:
    module = build(family, seed=1)
    rows = ids()
    module.generation_config.eos_token_id = None
    made = continued(ma.load(module), prompts(rows), N)
    assert made.prompts == (T,) * 3 and made.mask is None
    assert made.inputs["input_ids"].tolist() == [by_hand(module, row, N) for row in rows]
    assert made.origin.packing["generated"] == {"tokens": N, "temperature": 0.0, "seed": 0}


def test_prompts_of_several_lengths_are_gone_on_with_from_their_ends() -> None:
    module, rows = build("llama", seed=1), ids()
    module.generation_config.eos_token_id = None
    mask = torch.ones_like(rows)
    mask[1, 4:] = 0
    made = continued(ma.load(module), prompts(rows, mask), N)
    assert made.prompts == (T, 4, T) and made.mask is not None
    for i, n in enumerate(made.prompts):
        assert made.inputs["input_ids"][i, : n + N].tolist() == by_hand(module, rows[i, :n], N)
        assert made.mask[i].tolist() == [t < n + N for t in range(T + N)]
    assert [made.written_by(1, t) for t in (0, 3, 4)] == ["prompt", "prompt", "generated"]
    assert made.part(1).prompts == (4, T) and prompts(rows).written_by(0, 0) == ""


def test_what_is_drawn_goes_by_its_seed_and_leaves_other_draws_alone() -> None:
    module = build("llama", seed=1)
    model, text = ma.load(module), prompts(ids())
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    one, same, other = (continued(model, text, 8, temperature=2.0, seed=s).inputs["input_ids"] for s in (1, 1, 2))
    assert torch.rand(1) == wanted
    assert torch.equal(one, same) and one.shape != other.shape or not torch.equal(one, other)
    module.generation_config.eos_token_id = None
    cold = continued(model, text, 8, temperature=1e-4).inputs["input_ids"]
    assert torch.equal(cold, continued(model, text, 8).inputs["input_ids"])


def test_draws_follow_the_softmax_at_that_temperature() -> None:
    module = build("llama", seed=1)
    module.generation_config.eos_token_id = None
    rows = ids(n=1).expand(400, -1)
    made = continued(ma.load(module), prompts(rows), 1, temperature=0.05).inputs["input_ids"][:, -1]
    with torch.no_grad():
        p_V = (module(rows[:1]).logits[0, -1].double() / 0.05).softmax(-1)
    share_V = torch.bincount(made, minlength=99) / 400
    assert p_V.max() < 0.9 and (share_V - p_V).abs().max() < 4 * (0.25 / 400) ** 0.5


def test_a_text_ends_before_its_end_token() -> None:
    module, rows = build("llama", seed=1), ids(n=1)
    module.generation_config.eos_token_id = None
    model = ma.load(module)
    whole = continued(model, prompts(rows), N).inputs["input_ids"][0].tolist()
    third = whole[T + 2]
    assert third not in whole[T : T + 2]
    module.generation_config.eos_token_id = [third, 98]
    assert continued(model, prompts(rows), N).inputs["input_ids"].tolist() == [whole[: T + 2]]
    module.generation_config.eos_token_id = whole[T]
    with pytest.raises(UserError, match="nothing"):
        continued(model, prompts(rows), N)


def _text(name: str) -> Callable[[], tuple[nn.Module, Corpus]]:
    return lambda: (build(name), prompts(ids()))


def _image() -> tuple[nn.Module, Corpus]:
    made = ma.corpus({"pixel_values": torch.rand(2, 3, 20, 20)})
    assert isinstance(made, Corpus)
    return build("vit"), made


@pytest.mark.parametrize(
    ("make", "word"),
    [(_text("bert"), "encoder"), (_text("t5"), "decoder"), (_image, "pixel_values"), (_text("gpt2"), "64")],
    ids=["encoder", "encoder and decoder", "images", "no room"],
)
def test_what_cannot_be_gone_on_with_is_told_in_a_sentence(
    make: Callable[[], tuple[nn.Module, Corpus]], word: str
) -> None:
    module, text = make()
    with pytest.raises(UserError, match=word) as error:
        ma.scan(module, text, generate=60)
    assert len(error.value.why) < 200 and error.value.do


def test_no_tokens_are_no_number_of_tokens() -> None:
    for n in (0, -3, 2.5, True):
        with pytest.raises(UserError, match="generate"):
            ma.scan(build("llama"), ids(), generate=n)
    with pytest.raises(UserError, match="temperature"):
        ma.scan(build("llama"), ids(), generate=2, temperature=-1.0)
    with pytest.raises(UserError, match="0 tokens"):
        continued(ma.load(build("llama")), prompts(ids()), 0)
