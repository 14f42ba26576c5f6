"""A damaged or hostile run directory is refused with one message, never with a traceback."""

from __future__ import annotations

import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from massact.records.answer import Answer
from massact.records.errors import UserError
from massact.records.kinds.scan import open_run
from massact.reports import show, to_json

RUN = next((Path(__file__).parents[1] / "golden" / "schema_1").rglob("run.json")).parent
INFO = json.loads((RUN / "run.json").read_text(encoding="utf-8"))
WRONG: list[Any] = [None, -1, 10**30, 1.5, "nan", "x", True, [], {}, [1, 2], {"a": 1}, "\x1b[31m"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(RUN, tmp_path_factory.mktemp("damaged") / "run"))


def read(path: Path) -> None:
    """Open and print: either works or is refused."""
    try:
        result = open_run(path)
        show(result, Console(file=io.StringIO(), width=80))
        json.loads(to_json(result))
    except UserError as error:
        assert error.what


@st.composite
def records(draw: st.DrawFn) -> Any:
    """run.json with one value replaced or removed, at any depth."""
    info = copy.deepcopy(INFO)
    node: Any = info
    while True:
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 4)):
            node = node[key]
            continue
        if draw(st.integers(0, 5)):
            node[key] = draw(st.sampled_from(WRONG))
        else:
            del node[key]
        return info


@settings(max_examples=50)
@given(records())
def test_any_value_of_run_json(run: Path, info: Any) -> None:
    (run / "run.json").write_text(json.dumps(info), encoding="utf-8")
    read(run)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema_version": 1, "verb": ' + "9" * 5000 + "}", "null", ""])
def test_json_that_breaks_parsers(run: Path, text: str) -> None:
    (run / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError):
        open_run(run)


@pytest.mark.parametrize("value", ["x", None, b"x", [1]])
def test_tables_of_the_wrong_type(tmp_path: Path, value: object) -> None:
    run = Path(shutil.copytree(RUN, tmp_path / "run"))
    layers = pd.read_parquet(run / "layers.parquet")
    layers["n_findings"] = [value] * len(layers)
    layers.to_parquet(run / "layers.parquet")
    with pytest.raises(UserError, match="numbers"):
        open_run(run)


def test_an_answer_comes_back_as_it_was() -> None:
    answer = Answer.from_dict(INFO["answer"])
    assert Answer.from_dict(json.loads(json.dumps(answer.as_dict()))) == answer


def test_a_name_that_is_too_long() -> None:
    with pytest.raises(UserError, match="No such run"):
        open_run("a" * 5000)
