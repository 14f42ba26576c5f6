"""The task of the toy lab: every backcopy copies, bigrams follow the chain, starts are as asked for."""

from __future__ import annotations

import pytest
import torch

from massact.labs.backcopy import Backcopy, random_backcopy, text_backcopy
from tests.facts import each

TASKS = {"random": random_backcopy(seed=3), "text": text_backcopy()}


def drawn(task: Backcopy, n: int = 400, starts: str = "mixed", seed: int = 0, **options: float) -> torch.Tensor:
    return task.draw(n, 32, starts, torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("starts", ["bos", "none", "mixed"])
def test_every_backcopy_copies_and_kinds_say_which(task: Backcopy, starts: str) -> None:
    ids_BT = drawn(task, starts=starts)
    copies_BT, bigrams_BT = task.kinds(ids_BT)
    seen = 0
    for ids_T, copies_T, bigrams_T in zip(ids_BT.tolist(), copies_BT.tolist(), bigrams_BT.tolist(), strict=True):
        assert ids_T.count(task.bos) == (ids_T[0] == task.bos)
        first = ids_T[1] if ids_T[0] == task.bos else ids_T[0]
        assert not task.triggers_V[first]
        for t in range(1, len(ids_T)):
            after_trigger = ids_T[t - 1] != task.bos and bool(task.triggers_V[ids_T[t - 1]])
            assert copies_T[t - 1] == after_trigger
            assert bigrams_T[t - 1] == (not after_trigger and ids_T[t - 1] != task.bos)
            if after_trigger:
                seen += 1
                assert ids_T[t] == ids_T[t - 2]
    assert seen > 100


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_bigrams_follow_the_chain(task: Backcopy) -> None:
    V = task.bos
    ids_BT = drawn(task, n=4000, starts="none")
    bigrams_BT = task.kinds(ids_BT)[1]
    pairs = ids_BT[:, :-1][bigrams_BT] * V + ids_BT[:, 1:][bigrams_BT]
    counts_VV = torch.bincount(pairs, minlength=V * V).view(V, V).double()
    assert (counts_VV.sum(0)[task.triggers_V] > 0).all() and not counts_VV.sum(1)[task.triggers_V].any()
    assert counts_VV[task.transition_VV == 0].sum() == 0
    often = counts_VV.sum(1) > 500
    assert often.sum() > 10
    found_VV = counts_VV[often] / counts_VV[often].sum(1, keepdim=True)
    told_VV = task.transition_VV[often]
    error_VV = (told_VV * (1 - told_VV) / counts_VV[often].sum(1, keepdim=True)).sqrt()
    assert ((found_VV - told_VV).abs() <= 6 * error_VV + 1e-3).all()


def test_starts_are_as_asked_for() -> None:
    task = TASKS["random"]
    drawn_of = {s: drawn(task, 2000, s, share=0.8) for s in ("bos", "none", "mixed")}
    share = {s: float((ids_BT[:, 0] == task.bos).double().mean()) for s, ids_BT in drawn_of.items()}
    assert (share["bos"], share["none"]) == (1.0, 0.0) and abs(share["mixed"] - 0.8) < 0.05
    first = drawn(task, 4000, "none")[:, 0]
    assert not task.triggers_V[first].any() and len(first.unique()) > 10


def test_the_same_seed_draws_the_same() -> None:
    for task in TASKS.values():
        assert torch.equal(drawn(task), drawn(task)) and not torch.equal(drawn(task), drawn(task, seed=1))
    assert torch.equal(random_backcopy(seed=3).transition_VV, TASKS["random"].transition_VV)
    assert not torch.equal(random_backcopy(seed=4).transition_VV, TASKS["random"].transition_VV)


def test_tasks_are_what_they_say() -> None:
    task = text_backcopy("abracadabra abba", n_triggers=2)
    assert task.characters == " abcdr" and task.bos == 6
    assert [c for c, t in zip(task.characters, task.triggers_V, strict=True) if t] == ["a", "b"]
    row = dict(zip(task.characters, task.transition_VV[task.characters.index("b")].tolist(), strict=True))
    assert (row["r"], row["b"], row["a"]) == (0.5, 0.25, 0.25)
    for made in TASKS.values():
        torch.testing.assert_close(made.transition_VV.sum(1), torch.ones(made.bos, dtype=torch.double))
        assert int(made.triggers_V.sum()) == 3 and (made.entropy_V >= 0).all()
        assert made.unigram_V[made.triggers_V].min() >= made.unigram_V[~made.triggers_V].max()
    assert task.spelled(torch.tensor([6, 1, 2])) == "ab"
    with pytest.raises(ValueError, match=each("no room", "3 triggers")):
        text_backcopy("aab")
    with pytest.raises(ValueError, match=each("no room", "3 triggers")):
        random_backcopy(3)
