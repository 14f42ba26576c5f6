"""Zero-shot tasks of lm-eval on the live model, without edits and with each."""

from __future__ import annotations

import copy
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from massact.corpora.hub import no_code_asked
from massact.interventions.effects import Paired
from massact.models import Model
from massact.records.errors import UserError, WorkError
from massact.trace import Fired, observing
from massact.trace.edits import AnyEdit

INSTALL = "Install it: pip install 'massact[tasks]'"


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse tasks, before a model is loaded, where lm-eval is not installed.

    Raises:
        UserError: says how it is.
    """
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise UserError("Tasks need lm-eval.", "The package lm-eval is not installed.", INSTALL)


def evaluate_tasks(
    model: Model,
    tasks: Sequence[str],
    edits: Sequence[AnyEdit],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Paired]:
    """Run lm-eval on the live model; every metric that a task gives for each question, paired by question.

    Args:
        model: with a tokenizer and a language-model head.
        tasks: names that lm-eval knows (piqa, winogrande, arc_easy, arc_challenge, boolq, ...).
        edits: each applied to the live module while lm-eval runs.
        folder: of task files of one's own (YAML), which work offline.
        limit: questions of each task, from its start.
        batch_size: questions per forward pass.
        progress: called with runs done and runs in all.

    Returns:
        task -> what was measured of every question.

    Raises:
        UserError: lm-eval is not installed, a task is unknown or cannot be read, or the model has no tokenizer.
        WorkError: an edit did not fire, or lm-eval asked other questions with it than without.
    """
    if model.tokenizer is None:
        raise UserError("Tasks are text, and the model has no tokenizer.", do="Give one: load(..., tokenizer=...).")
    lm_eval, HFLM = _lm_eval()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    no_code_asked(sys.modules.get("datasets"))
    with _as_it_is(model.module):
        harness = HFLM(
            pretrained=model.module, tokenizer=copy.deepcopy(model.tokenizer), batch_size=batch_size,
            prefix_token_id=_prefix(model), trust_remote_code=False,
        )  # fmt: skip
    manager = lm_eval.tasks.TaskManager(include_path=str(folder) if folder is not None else None)
    unknown = [t for t in tasks if t not in manager.all_tasks]
    if unknown:
        raise UserError(f"lm-eval knows no task {unknown[0]!r}.", do="List them: lm-eval ls tasks")

    def run(edit: AnyEdit | None) -> tuple[dict[str, _Told], Fired | None]:
        with observing(model, edits=[] if edit is None else [edit]) as seen, _no_questions(lm_eval):
            try:
                out = lm_eval.simple_evaluate(
                    model=harness, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=True,
                    bootstrap_iters=0, confirm_run_unsafe_code=False,
                )  # fmt: skip
            except (OSError, ConnectionError, ValueError, AssertionError) as error:
                first = (str(error).strip().splitlines() or ["A question or an answer is longer than the context."])[0]
                do = "Without a network, give local task files: --task-folder"
                raise UserError("lm-eval could not run the tasks.", first, do) from error
        return {t: _told(t, samples) for t, samples in out["samples"].items()}, next(iter(seen.edits), None)

    baseline, _ = run(None)
    after: dict[str, tuple[dict[str, _Told], Fired]] = {}
    for i, edit in enumerate(edits, 1):
        now, fired = run(edit)
        assert fired is not None
        for task in baseline | now:
            _check_paired(task, edit.name, baseline.get(task, _Told({}, {})), now.get(task, _Told({}, {})))
        after[edit.name] = now, fired
        if progress is not None:
            progress(i, len(edits))
    return {
        task: Paired(
            np.arange(n := len(told.questions)), np.ones(n), told.scores,
            {name: now[task].scores for name, (now, _) in after.items()},
            {name: fired for name, (_, fired) in after.items()},
        )
        for task, told in baseline.items()
    }  # fmt: skip


@contextmanager
def _as_it_is(module: Any) -> Iterator[None]:
    """lm-eval ties the weights of what it is given; a live module may have a head of its own."""
    module.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del module.tie_weights


@contextmanager
def _no_questions(lm_eval: Any) -> Iterator[None]:
    """lm-eval asks git and a dozen other programs where it runs; what they say goes into a record that nobody keeps."""
    evaluator, names = lm_eval.evaluator, ("get_git_commit_hash", "add_env_info")
    before = {name: getattr(evaluator, name) for name in names if hasattr(evaluator, name)}
    for name in before:
        setattr(evaluator, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(evaluator, name, function)


def _prefix(model: Model) -> int | None:
    """What stands before a text without a context: None for the tokenizer's own start, a newline where it has none."""
    has = [getattr(model.tokenizer, f"{name}_token_id", None) for name in ("bos", "eos")]
    return None if any(x is not None for x in has) else int(model.tokenizer.encode("\n", add_special_tokens=False)[0])


def _lm_eval() -> tuple[Any, Any]:
    try:
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.tasks
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError("Tasks need lm-eval, which is not installed.", str(error), INSTALL) from None
    return lm_eval, HFLM


@dataclass(frozen=True)
class _Told:
    """What lm-eval told of one task.

    Args:
        questions: id -> hashes of what was asked.
        scores: metric -> (questions,), in this order.
    """

    questions: dict[Any, tuple[Any, ...]]
    scores: dict[str, np.ndarray]


def _told(task: str, samples: list[dict[str, Any]]) -> _Told:
    """Every metric of every question; a task that reads each answer in several ways (filters) has one for each way."""
    ways: dict[Any, dict[Any, dict[str, Any]]] = {}
    for sample in samples:
        ways.setdefault(sample.get("filter"), {})[sample["doc_id"]] = sample
    scores: dict[str, np.ndarray] = {}
    questions: dict[Any, tuple[Any, ...]] = {}
    for way, by_id in ways.items():
        ids = sorted(by_id)
        first = by_id[ids[0]]
        for name in first.get("metrics", []):
            if isinstance(first.get(name), int | float | bool):
                # As lm-eval prints it.
                scores[name if len(ways) == 1 else f"{name},{way}"] = np.array([float(by_id[i][name]) for i in ids])
        questions |= {i: tuple(by_id[i].get(f"{part}_hash") for part in ("doc", "prompt", "target")) for i in ids}
    if not scores:
        raise WorkError(f"Task {task!r} gives no number for each question.", do="Choose a task with accuracy.")
    return _Told(dict(sorted(questions.items())), scores)


def _check_paired(task: str, edit: str, before: _Told, after: _Told) -> None:
    """Refuse two runs that are not of the same questions."""
    if before.questions == after.questions and set(before.scores) == set(after.scores):
        return
    old, new = before.questions.items(), after.questions.items()
    other = sorted({i for i, _ in old ^ new})
    raise WorkError(
        f"lm-eval asked other questions of task {task!r} with the edit {edit!r} than without: {len(new)} against "
        f"{len(old)}, of which {len(old & new)} are the same"
        + (f" (question {other[0]} is not)." if other else f" (metrics {[*after.scores]} against {[*before.scores]})."),
        "Its effect is the difference of the answers to each question.",
        "Choose a task that asks the same questions in every run: no sampling of its own, no questions left out.",
    )
