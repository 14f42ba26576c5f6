"""lm-eval on the patched model, from local task files: every answer's log p against a sum written out by hand."""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import massact as ma
from massact.interventions import intervene, zero_dims
from massact.interventions.effects import effects_of
from massact.interventions.tasks import evaluate_tasks
from massact.models import Model
from massact.records.errors import UserError, WorkError
from massact.trace import Edit, edited
from massact.trace.edits import AnyEdit
from tests.facts import each

tasks = pytest.importorskip("lm_eval.tasks")

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{{{query}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{[first, second]}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
LAST_WORD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: loglikelihood
validation_split: validation
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
ANSWERS = [
    ("where is the boat", "on the sea", "in a very small house by the road"), ("who", "he", "nobody at all"),
    ("what is cold", "the wind and the rain", "fire"), ("how old is she", "seven", "six or so, not more"),
    ("why", "for a reason that is hard to say", "so"), ("when", "now", "on the next day"),
    ("is it far", "yes", "no"), ("which one is it", "the red one", "the blue one of them"),
    ("what is up", "the sun", "a kite that is made of paper"), ("can it swim", "it can", "it cannot swim at all"),
    ("a", "b", "c"), ("is the sea wide", "wide", "it is wide, and cold, and old"),
]  # fmt: skip
QUESTIONS = [{"query": q, "first": a, "second": b, "label": i % 2} for i, (q, a, b) in enumerate(ANSWERS)]
TEXTS = [{"text": t} for t in ("the boat is on the sea", "she was seven years old", "so it goes", "the wind is cold",
                               "all of them are here now", "no one saw the small house")]  # fmt: skip


def letters() -> PreTrainedTokenizerFast:
    """One token for each byte; an end of text, as GPT-2 has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<end>"])}, merges=[]))
    known.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    known.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=known, eos_token="<end>", bos_token="<end>")


def tiny(tied: bool = True) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257, n_embd=32, n_layer=3, n_head=4, n_positions=128, initializer_range=0.4, bos_token_id=256,
        eos_token_id=256, tie_word_embeddings=tied,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Without what takes lm-eval seconds at each run: a list of all its own tasks, a report about the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda *_: None)
        ordinary = tasks.TaskManager

        def few(**options: Any) -> Any:
            return ordinary(**options, include_defaults=False)

        patch.setattr(tasks, "TaskManager", few)
        yield


@pytest.fixture(scope="module")
def model() -> Model:
    return ma.load(tiny(), tokenizer=letters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files that need no network."""
    made = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(made / "cache"))
        write(made, "two_answers", CHOICE, QUESTIONS)
        write(made, "last_word", LAST_WORD, TEXTS)
    return made


def write(folder: Path, name: str, task: str, rows: Sequence[dict[str, Any]]) -> None:
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / f"{name}.yaml").write_text(task.format(name=name, file=file))


def edits() -> list[AnyEdit]:
    """Two that change answers."""
    return [zero_dims(range(0, 32, 2), "1.resid_post"), Edit("turned", "3.resid_post", lambda h, b: -h)]


@torch.no_grad()
def log_p(model: Model, context: str, answer: str) -> tuple[float, bool]:
    """Sum of log p of the answer's tokens behind the context, and whether each is the most likely one."""
    before, whole = (model.tokenizer.encode(t, add_special_tokens=False) for t in (context, context + answer))
    assert whole[: len(before)] == before and len(whole) < model.module.config.max_position_embeddings
    logits = model.module(input_ids=torch.tensor([whole[:-1]])).logits[0]
    p = logits.double().log_softmax(-1)
    rows = [(t, p[t - 1]) for t in range(len(before), len(whole))]
    return sum(float(r[whole[t]]) for t, r in rows), all(int(r.argmax()) == whole[t] for t, r in rows)


def by_hand(model: Model, rows: Sequence[tuple[str, Sequence[str], int]], edit: AnyEdit | None) -> dict[str, Any]:
    """acc, acc_norm and the least margin between two answers, of (context, answers, label)."""
    with edited(model, edit) if edit is not None else nullcontext():
        sums = [[log_p(model, context, " " + a)[0] for a in answers] for context, answers, _ in rows]
    lengths = [[len(a) for a in answers] for _, answers, _ in rows]
    labels = np.array([label for *_, label in rows])
    plain, normed = np.array(sums), np.array(sums) / np.array(lengths)
    margins = [float(np.abs(x[:, 0] - x[:, 1]).min()) for x in (plain, normed)]
    return {"acc": (plain.argmax(1) == labels).astype(float), "acc_norm": (normed.argmax(1) == labels).astype(float),
            "margin": min(margins)}  # fmt: skip


CONTEXTS = [(f"Question: {q['query']}\nAnswer:", (q["first"], q["second"]), q["label"]) for q in QUESTIONS]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_every_answer_is_that_of_the_sums(model: Model, folder: Path, batch_size: int) -> None:
    done = evaluate_tasks(model, ["two_answers"], edits(), folder=folder, batch_size=batch_size)
    paired = done["two_answers"]
    assert list(done) == ["two_answers"] and paired.sequences.tolist() == list(range(len(QUESTIONS)))
    assert paired.n_targets.tolist() == [1] * len(QUESTIONS)
    told = {None: paired.baseline} | {e: paired.edited[e.name] for e in edits() for e in [e]}
    answers = []
    for edit, got in told.items():
        wanted = by_hand(model, CONTEXTS, edit)
        assert wanted["margin"] > 1e-4, "a question is too close to call"
        for name in ("acc", "acc_norm"):
            np.testing.assert_array_equal(got[name], wanted[name], err_msg=f"{name} of {edit}")
        answers.append(got["acc"].tolist() + got["acc_norm"].tolist())
    assert len({tuple(a) for a in answers}) == 3, "no edit changes an answer: nothing is tested"
    assert all(f.n_calls > 0 and f.n_elements > 0 for f in paired.fired.values())


def test_the_last_word(model: Model, folder: Path) -> None:
    """log p of the last word of each text, and whether it is the greedy continuation."""
    chosen = edits()
    paired = evaluate_tasks(model, ["last_word"], chosen, folder=folder)["last_word"]
    for edit, got in ((None, paired.baseline), *((e, paired.edited[e.name]) for e in chosen)):
        with edited(model, edit) if edit is not None else nullcontext():
            pairs = [log_p(model, *cut(row["text"])) for row in TEXTS]
        np.testing.assert_allclose(got["perplexity"], [p for p, _ in pairs], rtol=1e-4)
        assert got["acc"].tolist() == [float(greedy) for _, greedy in pairs]


def cut(text: str) -> tuple[str, str]:
    context, _, word = text.rpartition(" ")
    return context, " " + word


def test_several_tasks_and_the_first_questions(model: Model, folder: Path) -> None:
    """`limit` takes them from the start of each task; progress counts the edits."""
    seen: list[tuple[int, int]] = []
    both = ["last_word", "two_answers"]
    some = evaluate_tasks(model, both, edits(), folder=folder, limit=4, progress=lambda *n: seen.append(n))
    every = evaluate_tasks(model, both, edits(), folder=folder)
    assert set(some) == set(both) and seen == [(1, 2), (2, 2)]
    for task, paired in some.items():
        assert len(paired.sequences) == 4
        np.testing.assert_allclose(paired.baseline["acc"], every[task].baseline["acc"][:4])
        for name, got in paired.edited.items():
            np.testing.assert_allclose(got["acc"], every[task].edited[name]["acc"][:4])
    assert len(every["two_answers"].sequences) == 12 and len(every["last_word"].sequences) == 6


def state(model: Model) -> tuple[dict[str, torch.Tensor], Any, Any]:
    module = model.module
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in module.modules()]
    return {k: v.clone() for k, v in module.state_dict().items()}, hooks, module.training


def test_the_model_is_left_as_it_was(model: Model, folder: Path) -> None:
    """Weights bit for bit, no hook, the mode; the same logits."""
    before, ids = state(model), torch.arange(20)[None]
    with torch.no_grad():
        logits = model.module(ids).logits
        evaluate_tasks(model, ["two_answers"], edits(), folder=folder, limit=3)
        assert torch.equal(model.module(ids).logits, logits)
    after = state(model)
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items()) and before[1:] == after[1:]


def test_untied_weights_stay_untied(folder: Path) -> None:
    """A live module may differ from what its configuration says: its head is its own."""
    module = tiny()
    with torch.no_grad():
        module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight * 2)
    model = ma.load(module, tokenizer=letters())
    before = model.module.lm_head.weight.clone()
    evaluate_tasks(model, ["two_answers"], [], folder=folder, limit=2)
    assert torch.equal(model.module.lm_head.weight, before)


def test_the_tokenizer_is_left_as_it_was(folder: Path) -> None:
    model = ma.load(tiny(), tokenizer=letters())
    assert model.tokenizer.pad_token is None
    evaluate_tasks(model, ["two_answers"], [], folder=folder, limit=2)
    assert model.tokenizer.pad_token is None


def test_tasks_are_rows_of_the_effects(model: Model, folder: Path) -> None:
    """`task/acc` with its interval: that of the questions, paired."""
    ids = torch.randint(1, 200, (8, 32), generator=torch.Generator().manual_seed(0))
    scan = ma.scan(model, ids, thresholds={"magnitude": 1.0, "ratio": 2.0}, null=False, bos_contrast=False)
    assert len(scan.findings)
    done = intervene(
        model, ids, scan, sets=("dims",), tasks=("two_answers", "last_word"), task_folder=str(folder), limit=6,
        sinks=False, repetition=False,
    )  # fmt: skip
    rows = done.effects.set_index("metric")
    wanted = {"two_answers/acc", "two_answers/acc_norm", "last_word/acc", "last_word/perplexity"}
    assert {m for m in rows.index if "/" in m} == wanted and (rows.loc[sorted(wanted)].n_sequences == 6).all()
    target = done.info.target
    edit = zero_dims(target["dims"], target["site"])
    paired = evaluate_tasks(model, ["two_answers"], [edit], folder=folder, limit=6)["two_answers"]
    for metric in ("acc", "acc_norm"):
        row, told = rows.loc[f"two_answers/{metric}"], by_hand(model, CONTEXTS[:6], edit)
        base = by_hand(model, CONTEXTS[:6], None)
        assert row.baseline == pytest.approx(base[metric].mean()) and row.edited == pytest.approx(told[metric].mean())
        effect = {e.metric: e for e in effects_of(paired, edit.name, np.ones(6, bool))}[metric]
        assert (row.ci_low, row.ci_high) == pytest.approx((effect.ci_low, effect.ci_high))
        assert row.ci_low <= row.delta <= row.ci_high and row.group == "all" and row.n_calls > 0


def answered(monkeypatch: pytest.MonkeyPatch, *runs: list[dict[str, Any]]) -> None:
    """What lm-eval gives of the task two_answers in the first run, the second, ..., in place of running it."""
    left = iter(runs)

    def evaluate(model: Any, **_: Any) -> dict[str, Any]:
        with torch.no_grad():
            model.model(torch.arange(5)[None])  # an edit must fire
        return {"samples": {"two_answers": next(left)}}

    monkeypatch.setattr("lm_eval.simple_evaluate", evaluate)


def sample(i: int, acc: float, **more: Any) -> dict[str, Any]:
    return {"doc_id": i, "acc": acc, "metrics": ["acc"], "filter": "none", "prompt_hash": f"p{i}"} | more


def test_answers_are_paired_by_question(model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order in which a run asks them."""
    answered(monkeypatch, [sample(0, 1), sample(1, 0), sample(7, 1)], [sample(7, 0), sample(0, 1), sample(1, 1)])
    edit = edits()[1]
    paired = evaluate_tasks(model, ["two_answers"], [edit], folder=folder)["two_answers"]
    assert paired.baseline["acc"].tolist() == [1, 0, 1] and paired.edited[edit.name]["acc"].tolist() == [1, 1, 0]


def test_an_answer_that_is_read_in_two_ways(model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two metrics of two questions, not one of four."""
    run = [sample(i, acc, filter=way) for way, accs in {"strict": (0, 0), "flexible": (1, 0)}.items()
           for i, acc in enumerate(accs)]  # fmt: skip
    answered(monkeypatch, run, run)
    edit = edits()[1]
    paired = evaluate_tasks(model, ["two_answers"], [edit], folder=folder)["two_answers"]
    assert {k: v.tolist() for k, v in paired.baseline.items()} == {"acc,strict": [0, 0], "acc,flexible": [1, 0]}
    assert len(paired.sequences) == 2 and set(paired.edited[edit.name]) == set(paired.baseline)


@pytest.mark.parametrize(
    ("other", "said"),
    [([sample(0, 1), sample(2, 0)], "question 1"), ([sample(0, 1)], "1 against 2"),
     ([sample(0, 1), sample(1, 0), sample(2, 0)], "question 2"),
     ([sample(0, 1), sample(1, 0, prompt_hash="another")], "question 1"),
     ([sample(i, 1, filter="other") | {"f1": 0.5, "metrics": ["f1"]} for i in range(2)], "f1")],
)  # fmt: skip
def test_other_questions_are_never_paired(
    model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch, other: list[dict[str, Any]], said: str
) -> None:
    answered(monkeypatch, [sample(0, 1), sample(1, 0)], other)
    with pytest.raises(WorkError, match=each("questions", "'two_answers'", "'turned'")) as refused:
        evaluate_tasks(model, ["two_answers"], [edits()[1]], folder=folder)
    assert said in refused.value.what


# -------------------------------------------------------------------------------------------------------- refusals
def test_an_unknown_task(model: Model, folder: Path) -> None:
    with pytest.raises(UserError, match="'two_answer'"):
        evaluate_tasks(model, ["two_answers", "two_answer"], [], folder=folder)
    with pytest.raises(UserError, match="'two_answers'"):
        evaluate_tasks(model, ["two_answers"], [])


def test_a_model_without_a_tokenizer(folder: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        evaluate_tasks(ma.load(tiny()), ["two_answers"], [], folder=folder)


def test_without_lm_eval(model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says how to install it."""
    ordinary: Callable[..., Any] = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "lm_eval":
            raise ImportError("No module named 'lm_eval'")
        return ordinary(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError) as refused:
        evaluate_tasks(model, ["two_answers"], [], folder=folder)
    assert "not installed" in str(refused.value) and "pip install 'massact[tasks]'" in str(refused.value)


def test_a_task_whose_questions_are_missing(model: Model, tmp_path: Path) -> None:
    write(tmp_path, "gone", CHOICE, QUESTIONS)
    (tmp_path / "gone.jsonl").unlink()
    with pytest.raises(UserError, match=each("not", "tasks")):
        evaluate_tasks(model, ["gone"], [], folder=tmp_path)


def test_an_edit_that_does_nothing_is_an_error(model: Model, folder: Path) -> None:
    with pytest.raises(WorkError, match="changed nothing"):
        evaluate_tasks(
            model, ["two_answers"], [Edit("none", "1.resid_post", lambda h, b: h.clone())], folder=folder, limit=2
        )


# ------------------------------------------------------------------------------------------------------- real data
PIQA = """
task: piqa_here
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def test_real_piqa_questions(tmp_path: Path) -> None:
    """Forty short questions of PIQA, the embedded model, its hidden state without and with half of its dims."""
    data = Path(os.environ.get("MASSACT_TEST_DATA", "nowhere")) / "tasks"
    if not (data / "piqa_valid.jsonl").is_file():
        pytest.skip("no real questions: set MASSACT_TEST_DATA to a folder that has them (see tests/SKIPS.md)")
    model = ma.load()
    labels = (data / "piqa_valid_labels.lst").read_text().split()
    rows = [json.loads(line) for line in (data / "piqa_valid.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row | {"label": int(label)} for row, label in zip(rows, labels, strict=True)]
    width = [max(len(model.tokenizer.encode(f"Question: {r['goal']}\nAnswer: {r[s]}")) for s in ("sol1", "sol2"))
             for r in rows]  # fmt: skip
    short = [r for r, n in zip(rows, width, strict=True) if n <= 60 and r["sol1"].strip() == r["sol1"]][:40]
    assert len(short) == 40
    write(tmp_path, "piqa_here", PIQA, short)
    edit = zero_dims(range(0, model.anatomy.stacks[0].d_model, 2), "2.resid_post")
    paired = evaluate_tasks(model, ["piqa_here"], [edit], folder=tmp_path)["piqa_here"]
    contexts = [(f"Question: {r['goal']}\nAnswer:", (r["sol1"], r["sol2"]), r["label"]) for r in short]
    for one, got in ((None, paired.baseline), (edit, paired.edited[edit.name])):
        wanted = by_hand(model, contexts, one)
        for name in ("acc", "acc_norm"):
            # Two answers whose sums differ by less than a rounding may fall either way.
            assert np.abs(got[name] - wanted[name]).sum() <= (wanted["margin"] < 1e-4), name
    assert (paired.baseline["acc"] != paired.edited[edit.name]["acc"]).any()


def test_git_is_not_asked(model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a checkout git says "fatal: not a git repository" on stderr; what it says is kept nowhere."""
    import subprocess

    from lm_eval import evaluator

    asked: list[object] = []
    monkeypatch.setattr(subprocess, "check_output", lambda *given, **_: asked.append(given) or b"")
    before = evaluator.get_git_commit_hash
    evaluate_tasks(model, ["two_answers"], [], folder=folder, limit=1)
    assert not asked and evaluator.get_git_commit_hash is before
