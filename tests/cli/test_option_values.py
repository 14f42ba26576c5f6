"""Values of options given in Python: what is taken as it is meant, and what is refused, in a sentence with a remedy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from massact.records.errors import UserError
from massact.verbs.classics import ClassicsConfig
from massact.verbs.explain import ExplainConfig
from massact.verbs.intervene import InterveneConfig
from massact.verbs.reproduce import Given, ReproduceConfig
from massact.verbs.scan import ScanConfig


@pytest.mark.parametrize(
    ("kind", "name", "value", "read"),
    [
        (ScanConfig, "null", None, False),
        (ScanConfig, "bos_contrast", None, False),
        (ScanConfig, "thresholds", None, {}),
        (ScanConfig, "preprocess", None, {}),
        (ScanConfig, "top_k", np.int64(5), 5),
        (ExplainConfig, "columns", np.bool_(False), False),
        (ExplainConfig, "batch_size", np.int64(2), 2),
        (InterveneConfig, "layer", np.array([2, 3]), (2, 3)),
        (InterveneConfig, "layer", [np.int64(2), 3], (2, 3)),
        (InterveneConfig, "sets", ["zero"], ("zero",)),
        (InterveneConfig, "task_folder", Path("tasks"), "tasks"),
        (ReproduceConfig, "evaluate_on", [Path("a.txt")], ("a.txt",)),
        (ReproduceConfig, "head", Path("head.pt"), Path("head.pt")),
        (Given, "trained", ["a"], (Path("a"),)),
    ],
)
def test_what_is_meant_is_taken(kind, name, value, read):
    assert getattr(kind(**{name: value}), name) == read


@pytest.mark.parametrize(
    ("kind", "name", "value", "do"),
    [
        (ScanConfig, "n_sequences", "x", "Give a whole number from 1 on or None."),
        (ScanConfig, "n_sequences", 2.5, "Give a whole number from 1 on or None."),
        (ScanConfig, "n_sequences", 0, "Give a whole number from 1 on or None."),
        (ScanConfig, "n_sequences", True, "Give a whole number from 1 on or None."),
        (ScanConfig, "top_k", 2, "Give a whole number from 3 on."),
        (ScanConfig, "thresholds", [("ratio", 10)], "Give a dict of names and values."),
        (ScanConfig, "batch_size", None, "Give a whole number or 'auto'."),
        (ScanConfig, "null", 3, "Give True or False or 'auto'."),
        (ExplainConfig, "eps", "x", "Give a number."),
        (InterveneConfig, "sets", "zero", "Give several, as a list or a tuple."),
        (InterveneConfig, "layer", None, "Give a whole number or 'onset' or several, as a list or a tuple."),
        (ClassicsConfig, "which", None, "Give several, as a list or a tuple."),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(kind, name, value, do):
    with pytest.raises(UserError) as refused:
        kind(**{name: value})
    assert (refused.value.what, refused.value.do) == (f"{name} is {value!r}.", do)
