"""What edits do to sinks: every statistic against probabilities and values written out by an eager copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import massact as ma
from massact.interventions import Massive, drop_first, evaluate, replace_first
from massact.interventions.effects import Paired, effects_of
from massact.interventions.sinks import SINK_METRICS, Sinks
from massact.models import with_attention
from massact.records.sites import Site
from massact.trace import Edit, InputEdit
from massact.trace.text_rows import TEXT_POSITIONS
from tests.families import build

D, LAYERS = 32, 3
SHIFT = torch.linspace(-2, 2, D)
COLUMNS = {"alpha_first", "sink_secondary", "entropy_nats", "sink_rate"}


def ids(n: int = 5, length: int = 24, seed: int = 1) -> Tensor:
    """Random tokens behind one that is the same everywhere."""
    tokens = torch.randint(1, 90, (n, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = 0
    return tokens


def sharp(family: str) -> Any:
    """A random model whose attention is far from even: some heads have a sink, others have none.

    All tokens but 0 have something in common, so that a head's queries like or dislike the first key alike.
    """
    module = build(family, seed=2)
    common = 0.02 * torch.randn(D, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter *= 16
            if name.endswith("attn.c_attn.weight"):
                parameter[:, : 2 * D] *= 16
            if name.endswith(("wte.weight", "embed_tokens.weight")):
                parameter[1:] += common
    return module


def eager_copy(module: Any) -> Any:
    made = type(module)._from_config(copy.deepcopy(module.config), attn_implementation="eager").eval()
    made.load_state_dict(module.state_dict())
    return made


def blocks(module: Any) -> nn.ModuleList:
    return module.transformer.h if hasattr(module, "transformer") else module.model.layers


@contextmanager
def shifted(module: Any, layer: int) -> Iterator[None]:
    def hook(m: nn.Module, args: tuple, out: Any) -> Any:
        return out + SHIFT if isinstance(out, Tensor) else (out[0] + SHIFT, *out[1:])

    handle = blocks(module)[layer - 1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def values_of(block: Any, h_TD: Tensor) -> Tensor:
    """(K, T, F): by hand, from what the block reads."""
    if hasattr(block, "attn"):
        v_TD = block.attn.c_attn(block.ln_1(h_TD))[:, 2 * D :]
        return v_TD.reshape(len(h_TD), 4, -1).transpose(0, 1)
    v_TX = block.self_attn.v_proj(block.input_layernorm(h_TD))
    return v_TX.reshape(len(h_TD), -1, block.self_attn.head_dim).transpose(0, 1)


def queries_of(T: int, found: Sequence[int]) -> dict[str, set[int]]:
    """Which rows of a causal pass each statistic is over."""
    counted = {t for t in range(1, T) if t not in found}
    seeing = {t for t in counted if found and t > min(found)}
    return {"all": set(range(T)), "first": set(range(1, T)), "counted": counted, "findings": seeing}


def one_layer(
    p_HTT: np.ndarray, v_KTF: np.ndarray, found: Sequence[int], eps: float, over: dict[str, set[int]] | None = None
) -> dict[str, float]:
    """Every statistic of one sequence in one layer, in loops; NaN where there is nothing to be told."""
    H, T, _ = p_HTT.shape
    rows_of = {name: sorted(rows) for name, rows in (over or queries_of(T, found)).items()}
    every = rows_of["all"]
    v_HTF = np.repeat(v_KTF, H // len(v_KTF), axis=0)
    size = np.linalg.norm(v_HTF, axis=-1)
    rows: dict[str, list[float]] = {name: [] for name in SINK_METRICS}
    for h in range(H):
        p = p_HTT[h]
        seen = [[t for t in every if t >= k] for k in range(T)]
        alpha = np.array([np.mean([p[t, k] for t in at]) if at else np.nan for k, at in enumerate(seen)])
        rows["attention_first"].append(np.mean([p[t, 0] for t in rows_of["first"]]))
        rows["slot_mass"].append(np.mean([1 - p[t].sum() for t in every]))
        rows["alpha_first"].append(alpha[0])
        rows["sink_rate"].append(float(alpha[0] > eps))
        rows["sink_secondary"].append(max(alpha[k] for k in range(1, T) if len(seen[k]) >= min(16, len(every))))
        rows["entropy_nats"].append(np.mean([-sum(x * np.log(x) for x in p[t] if x > 0) for t in every]))
        rows["value_norm_first"].append(size[h, 0] / size[h, 1:].mean())
        out = (p @ v_HTF[h])[rows_of["counted"]]
        singular = np.linalg.svd(out, compute_uv=False)
        rows["update_stable_rank"].append((singular**2).sum() / singular[0] ** 2)
        if len(found):
            others = [t for t in range(T) if t not in found]
            if rows_of["findings"]:
                rows["attention_findings"].append(np.mean([sum(p[t, k] for k in found) for t in rows_of["findings"]]))
            rows["value_norm_ratio"].append(size[h, list(found)].mean() / size[h, others].mean())
    return {name: float(np.mean(x)) if x else float("nan") for name, x in rows.items()}


@torch.no_grad()
def naive(
    eager: Any,
    sequences: Sequence[Tensor],
    found: Sequence[Sequence[int]],
    behind: int,
    eps: float = 0.3,
    over: Callable[[Sequence[int], Sequence[int]], dict[str, set[int]]] = lambda t, at: queries_of(len(t), at),
) -> dict[str, np.ndarray]:
    """metric -> (N,): the mean over the layers behind one, each sequence alone; tokens are known behind layer 1.

    `over`: from the tokens and those with findings, which rows each statistic is over.
    """
    told: list[dict[str, float]] = []
    read: dict[int, Tensor] = {}  # what each block reads, after whatever hook was set behind the one before
    handles = [
        block.register_forward_pre_hook(lambda m, args, kw, i=i: read.update({i: args[0]}), with_kwargs=True)
        for i, block in enumerate(blocks(eager))
    ]
    for tokens, at in zip(sequences, found, strict=True):
        out = eager(input_ids=tokens[None], output_attentions=True)
        layers = []
        for i in range(behind, LAYERS):
            v_KTF = values_of(blocks(eager)[i], read[i][0]).double().numpy()
            mine = at if i >= 1 else []
            layers.append(one_layer(out.attentions[i][0].double().numpy(), v_KTF, mine, eps, over(tokens, mine)))
        known = {name: [x[name] for x in layers if not np.isnan(x[name])] for name in SINK_METRICS}
        told.append({name: float(np.mean(x)) if x else np.nan for name, x in known.items()})
    for handle in handles:
        handle.remove()
    return {name: np.array([x[name] for x in told]) for name in SINK_METRICS}


@torch.no_grad()
def planted(module: Any, sequences: Sequence[Tensor], layer: int = 1) -> tuple[Massive, list[list[int]]]:
    """A target at four dims that few tokens reach, and which: several of the first sequence, none of the last."""
    h = [module(input_ids=t[None], output_hidden_states=True).hidden_states[layer][0] for t in sequences]
    dims = (4, 9, 14, 21)
    cuts = tuple(float(h[-1][:, d].abs().max()) * 1.0001 for d in dims)
    found = [[t for t in range(len(x)) if any(abs(float(x[t, d])) >= c for d, c in zip(dims, cuts, strict=True))]
             for x in h]  # fmt: skip
    assert not found[-1] and sum(map(len, found)) > 2
    return Massive(Site("", layer, "resid_post"), dims, cuts, {}, {}), found


def check(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray], names: set[str]) -> None:
    assert set(got) & set(SINK_METRICS) == names
    for name in names:
        np.testing.assert_allclose(got[name], wanted[name], rtol=2e-4, atol=2e-6, err_msg=name)


SEEN = set(SINK_METRICS) - {"slot_mass"}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("layer", [1, 2])
def test_every_statistic_before_and_after_an_edit(family: str, layer: int) -> None:
    """Of the layers behind the edit; tokens with findings are those of the run without it."""
    module, tokens = sharp(family), ids()
    eager, edit = eager_copy(module), Edit("shift", f"{layer}.resid_post", lambda h, b: h + SHIFT)
    target, found = planted(eager, tokens, layer)
    paired = evaluate(with_attention(ma.load(module)), ma.corpus(tokens), [edit], batch_size=2, sinks=Sinks(target))
    before = naive(eager, tokens, found, layer)
    with shifted(eager, layer):
        after = naive(eager, tokens, found, layer)
    check(paired.baseline_of["shift"], before, SEEN)
    check(paired.edited["shift"], after, SEEN)
    for name in SEEN:
        known = ~np.isnan(before[name])
        assert np.abs(before[name] - after[name])[known].max() > 1e-4 or name == "sink_rate", f"{name} does not move"
    assert 0 < before["sink_rate"].mean() < 1, "either all heads have a sink or none has: no test of eps"


@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_the_bound_of_a_sink(eps: float) -> None:
    module, tokens = sharp("gpt2"), ids()
    paired = evaluate(
        with_attention(ma.load(module)), ma.corpus(tokens), [Edit("e", "1.resid_post", lambda h, b: h + SHIFT)],
        sinks=Sinks(eps=eps),
    )  # fmt: skip
    wanted = naive(eager_copy(module), tokens, [[]] * 5, 1, eps)
    np.testing.assert_allclose(paired.baseline_of["e"]["sink_rate"], wanted["sink_rate"], atol=1e-9)


def test_the_bound_is_03() -> None:
    assert Sinks().eps == 0.3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_without_a_target_nothing_is_told_of_findings(family: str) -> None:
    module, tokens = sharp(family), ids(2)
    edit = Edit("shift", "1.resid_post", lambda h, b: h + SHIFT)
    paired = evaluate(with_attention(ma.load(module)), ma.corpus(tokens), [edit], sinks=Sinks())
    check(paired.baseline_of["shift"], naive(eager_copy(module), tokens, [[]] * 2, 1),
          SEEN - {"attention_findings", "value_norm_ratio"})  # fmt: skip


@pytest.mark.parametrize("left", [False, True])
def test_padded_prompts_are_as_if_alone(left: bool) -> None:
    module, tokens, lengths = sharp("llama"), ids(), [24, 18, 24, 20, 22]
    mask = torch.zeros(5, 24, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, slice(-n, None) if left else slice(0, n)] = 1
    alone = [t[m.bool()] for t, m in zip(tokens, mask, strict=True)]
    eager, edit = eager_copy(module), Edit("shift", "1.resid_post", lambda h, b: h + SHIFT)
    target, found = planted(eager, alone)
    given = ma.corpus({"input_ids": tokens, "attention_mask": mask})
    for batch_size in (1, 5):
        paired = evaluate(with_attention(ma.load(module)), given, [edit], batch_size=batch_size, sinks=Sinks(target))
        check(paired.baseline_of["shift"], naive(eager, alone, found, 1), SEEN)
        with shifted(eager, 1):
            check(paired.edited["shift"], naive(eager, alone, found, 1), SEEN)


def told(paired: Paired, name: str) -> dict[str, Any]:
    return {e.metric: e for e in effects_of(paired, name, np.ones(len(paired.n_targets), bool))}


def test_sequences_without_findings_are_left_out() -> None:
    """They are no zeros: the mean is of those that have one, and says of how many."""
    module, tokens = sharp("llama"), ids()
    eager, edit = eager_copy(module), Edit("shift", "1.resid_post", lambda h, b: h + SHIFT)
    target, found = planted(eager, tokens)
    paired = evaluate(with_attention(ma.load(module)), ma.corpus(tokens), [edit], sinks=Sinks(target))
    having = np.array([bool(x) for x in found])
    assert 0 < having.sum() < 5
    np.testing.assert_array_equal(np.isnan(paired.baseline_of["shift"]["attention_findings"]), ~having)
    np.testing.assert_array_equal(np.isnan(paired.edited["shift"]["value_norm_ratio"]), ~having)
    effects, before = told(paired, "shift"), naive(eager, tokens, found, 1)
    with shifted(eager, 1):
        after = naive(eager, tokens, found, 1)
    for name in ("attention_findings", "value_norm_ratio"):
        effect = effects[name]
        assert effect.n_sequences == having.sum()
        assert effect.baseline == pytest.approx(before[name][having].mean(), rel=1e-4)
        assert effect.edited == pytest.approx(after[name][having].mean(), rel=1e-4)
        assert effect.ci_low <= effect.delta <= effect.ci_high
    assert effects["attention_first"].n_sequences == effects["kl"].n_sequences == 5


def test_without_all_keys_there_is_no_alpha_and_no_entropy() -> None:
    module, tokens = sharp("gpt2"), ids(3)
    eager, edit = eager_copy(module), Edit("shift", "1.resid_post", lambda h, b: h + SHIFT)
    target, found = planted(eager, tokens)
    model = with_attention(ma.load(module))
    paired = evaluate(model, ma.corpus(tokens), [edit], sinks=Sinks(target, all_keys=False))
    check(paired.baseline_of["shift"], naive(eager, tokens, found, 1), SEEN - COLUMNS)
    assert not COLUMNS & set(told(paired, "shift"))
    none = evaluate(model, ma.corpus(tokens), [edit])
    assert not none.baseline_of and not set(SINK_METRICS) & set(none.edited["shift"])


@torch.no_grad()
def test_mass_of_a_learned_sink() -> None:
    """gpt-oss: what is missing from the probabilities of all keys, also where its window hides some."""
    module, tokens = build("gpt_oss"), ids(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("sinks"):
                parameter.copy_(torch.linspace(0, 3, len(parameter)))
    edit = Edit("shift", "1.resid_post", lambda h, b: h + SHIFT)
    paired = evaluate(with_attention(ma.load(module)), ma.corpus(tokens), [edit], sinks=Sinks())
    eager = eager_copy(module)

    def slot() -> np.ndarray:
        given = eager(tokens, output_attentions=True).attentions[1:]
        return torch.stack([1 - a.double().sum(-1).mean((1, 2)) for a in given]).mean(0).numpy()

    wanted = slot()
    assert (wanted > 0.2).all() and (wanted < 0.9).all()
    np.testing.assert_allclose(paired.baseline_of["shift"]["slot_mass"], wanted, atol=1e-5)
    with shifted(eager, 1):
        np.testing.assert_allclose(paired.edited["shift"]["slot_mass"], slot(), atol=1e-5)


@pytest.mark.parametrize("n", [1, 2])
def test_dropped_tokens_move_the_findings(n: int) -> None:
    """Of all layers, as the edit is before them; a finding is followed to where its token is now."""
    module, tokens = sharp("llama"), ids(4)
    eager = eager_copy(module)
    target, found = planted(eager, tokens)
    kept = [i for i, at in enumerate(found) if not at or max(at) >= n]
    tokens, found = tokens[kept], [found[i] for i in kept]
    edit = drop_first(n)
    paired = evaluate(with_attention(ma.load(module)), ma.corpus(tokens), [edit], batch_size=2, sinks=Sinks(target))
    moved = [[t - n for t in at if t >= n] for at in found]
    assert any(moved) and moved != found
    check(paired.edited[edit.name], naive(eager, tokens[:, n:], moved, 0), SEEN)


def reordered(order: Sequence[int]) -> InputEdit:
    moved = (TEXT_POSITIONS, "input_ids", "attention_mask", "position_ids")
    return InputEdit("order", lambda x: {k: v[:, order] if k in moved else v for k, v in x.items()})


def added(n: int, behind: bool = False) -> InputEdit:
    """Tokens of its own at an end; of an edit that does not say so."""
    own = torch.arange(50, 50 + n)

    def apply(x: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = [own.expand(len(x["input_ids"]), -1), x["input_ids"]]
        return {"input_ids": torch.cat(parts[::-1] if behind else parts, 1)}

    return InputEdit("added", apply)


HOLE = [*range(2, 9), *range(12, 24)]
ORDER = [0, *range(14, 24), *range(1, 14)]
# an edit, and of each row behind it the position in the text, -1 for a token that is not of it
MOVES: dict[str, tuple[Any, list[int]]] = {
    "drop-first": (drop_first(1), list(range(1, 24))), "drop-first 3": (drop_first(3), list(range(3, 24))),
    "a hole": (reordered(HOLE), HOLE), "another order": (reordered(ORDER), ORDER),
    "tokens in front": (added(2), [-1, -1, *range(24)]), "tokens behind": (added(3, True), [*range(24), -1, -1, -1]),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_before_and_after_are_of_the_same_layers_and_queries(name: str, batch_size: int) -> None:
    """Of an edit in front of all layers. Both sides: the positions of the text that count in both, by hand."""
    module, tokens, (edit, at) = sharp("llama"), ids(4), MOVES[name]
    eager = eager_copy(module)
    target, found = planted(eager, tokens)
    kept = [i for i, mine in enumerate(found) if not mine or set(mine) & set(at)]
    tokens, found = tokens[kept], [found[i] for i in kept]
    paired = evaluate(with_attention(ma.load(module)), ma.corpus(tokens), [edit], batch_size=batch_size,
                      sinks=Sinks(target))  # fmt: skip
    given = [{"input_ids": t[None], TEXT_POSITIONS: torch.arange(24)[None]} for t in tokens]
    changed = [edit.apply(one)["input_ids"][0] for one in given]
    moved = [[r for r, p in enumerate(at) if p in mine] for mine in found]
    assert any(found)

    def common(in_text: Sequence[int], in_rows: Sequence[int]) -> dict[str, set[int]]:
        """Positions of the text that count on both sides."""
        before, after = queries_of(24, in_text), queries_of(len(at), in_rows)
        return {what: before[what] & {at[r] for r in after[what]} for what in before}

    def there(mine: Sequence[int]) -> list[int]:
        return [r for r, p in enumerate(at) if p in mine]

    def back(rows: Sequence[int]) -> list[int]:
        return next(mine for mine in [*found, []] if there(mine) == list(rows))

    def over_rows(_: Sequence[int], rows: Sequence[int]) -> dict[str, set[int]]:
        return {what: {at.index(p) for p in both} for what, both in common(back(rows), rows).items()}

    before = naive(eager, tokens, found, 0, over=lambda _, mine: common(mine, there(mine)))
    check(paired.baseline_of[edit.name], before, SEEN)
    check(paired.edited[edit.name], naive(eager, changed, moved, 0, over=over_rows), SEEN)
    alone = naive(eager, tokens, found, 0)
    same = name not in ("drop-first", "drop-first 3", "a hole")  # these take queries away
    assert np.allclose(before["attention_first"], alone["attention_first"], rtol=1e-3) == same


def test_queries_that_stay_are_all_of_them() -> None:
    """The baseline of an edit that moves nothing is over all queries, beside one that does."""
    module, tokens = sharp("llama"), ids(4)
    eager, still = eager_copy(module), Edit("shift", "1.resid_post", lambda h, b: h + SHIFT)
    target, found = planted(eager, tokens)
    paired = evaluate(with_attention(ma.load(module)), ma.corpus(tokens), [drop_first(3), still, replace_first(95)],
                      batch_size=2, sinks=Sinks(target))  # fmt: skip
    check(paired.baseline_of["shift"], naive(eager, tokens, found, 1), SEEN)
    check(paired.baseline_of[replace_first(95).name], naive(eager, tokens, found, 0), SEEN)


def test_another_first_token_leaves_them_where_they_are() -> None:
    module, tokens = sharp("gpt2"), ids(4)
    eager = eager_copy(module)
    target, found = planted(eager, tokens)
    edit = replace_first(95)
    paired = evaluate(with_attention(ma.load(module)), ma.corpus(tokens), [edit], sinks=Sinks(target))
    changed = tokens.clone()
    changed[:, 0] = 95
    check(paired.edited[edit.name], naive(eager, changed, found, 0), SEEN)
