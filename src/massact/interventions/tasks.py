"""Zero-shot tasks of lm-eval on the live model, without edits and with each."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from massact.corpora.hub import no_code_asked
from massact.interventions.effects import Paired
from massact.models import Model
from massact.records.errors import UserError, WorkError
from massact.trace import Fired
from massact.trace.edits import AnyEdit, edited

INSTALL = "Install it: pip install 'massact[tasks]'"


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
        WorkError: an edit did not fire.
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

    def run(edit: AnyEdit | None) -> tuple[dict[str, dict[str, np.ndarray]], Fired | None]:
        with edited(model, edit) if edit is not None else nullcontext([None]) as fired, _no_questions(lm_eval):
            try:
                out = lm_eval.simple_evaluate(
                    model=harness, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=True,
                    bootstrap_iters=0, confirm_run_unsafe_code=False,
                )  # fmt: skip
            except (OSError, ConnectionError, ValueError, AssertionError) as error:
                first = (str(error).strip().splitlines() or ["A question or an answer is longer than the context."])[0]
                do = "Without a network, give local task files: --task-folder"
                raise UserError("lm-eval could not run the tasks.", first, do) from error
        return {t: _scores(t, samples) for t, samples in out["samples"].items()}, fired[0]

    baseline, _ = run(None)
    after: dict[str, tuple[dict[str, dict[str, np.ndarray]], Fired]] = {}
    for i, edit in enumerate(edits, 1):
        scores, fired = run(edit)
        assert fired is not None
        after[edit.name] = scores, fired
        if progress is not None:
            progress(i, len(edits))
    return {
        task: Paired(
            np.arange(n := len(next(iter(scores.values())))), np.ones(n), scores,
            {name: got[task] for name, (got, _) in after.items()}, {name: fired for name, (_, fired) in after.items()},
        )
        for task, scores in baseline.items()
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


def _scores(task: str, samples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """metric -> (questions,), in the order of the questions."""
    rows = sorted(samples, key=lambda s: s["doc_id"])
    names = [n for n in rows[0].get("metrics", []) if isinstance(rows[0].get(n), int | float | bool)]
    if not names:
        raise WorkError(f"Task {task!r} gives no number for each question.", do="Choose a task with accuracy.")
    return {name: np.array([float(row[name]) for row in rows]) for name in names}
