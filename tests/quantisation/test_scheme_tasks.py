"""lm-eval tasks under a scheme: the answers are those of a run of the same task under the same edit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from massact.interventions.tasks import evaluate_tasks
from massact.quantisation import quantise
from massact.quantisation.roundings import Prepared, edit_of
from massact.quantisation.schemes import scheme
from massact.scans.earlier_scan import Reopened

pytest.importorskip("lm_eval.tasks")

TASK = """
task: two
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{query}}}}"
doc_to_target: label
doc_to_choice: "{{{{[first, second]}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
ROWS = [("The kettle", " sings", " x"), ("The lamp is", " low", " q"), ("It was", " the day", " zz"),
        ("He said", " that", " vv"), ("She went to", " the house", " kk"), ("In the", " morning", " jj")]  # fmt: skip


def test_answers_are_those_of_the_task_under_the_edit(scanned: Reopened, prepared: Prepared, tmp_path: Path) -> None:
    file = tmp_path / "two.jsonl"
    rows = [{"query": q, "first": a, "second": b, "label": 0} for q, a, b in ROWS]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "two.yaml").write_text(TASK.format(file=file))
    names = ("int8-tensor", "int8-tensor+exempt")
    done = quantise(scanned.model, scanned.corpus, scanned.scan, schemes=names, guilty="none", export="none",
                    tasks=("two",), task_folder=str(tmp_path))  # fmt: skip
    told = done.quantised[done.quantised["metric"] == "two/acc"].set_index("scheme")
    assert set(told.index) == set(names) and (told["n_sequences"] == len(ROWS)).all()
    edit = edit_of(prepared, scheme("int8-tensor"))
    by_hand = evaluate_tasks(scanned.model, ("two",), [edit], folder=tmp_path)["two"]
    assert told.loc["int8-tensor", "quantised"] == pytest.approx(by_hand.edited["int8-tensor"]["acc"].mean())
    assert told.loc["int8-tensor", "baseline"] == pytest.approx(by_hand.baseline["acc"].mean())
