"""Words about several streams, and about what is unavailable: said once, with every number, and never NaN."""

from __future__ import annotations

import copy
import io
import re

import numpy as np
import pandas as pd
import pytest
import synthetic
from rich.console import Console
from test_story import _fill, told

from massact.records.clusters import passing
from massact.records.kinds.explanation import Explanation
from massact.records.sites import runs_of
from massact.records.tables import frame
from massact.reports import answer_in_words, show, story_in_words
from massact.reports.spelling import cell, number, percent, portion
from massact.reports.stack_words import said_once, stream_sets
from tests.facts import tells

STREAMS = [f"stream_{k}" for k in range(3)]


def streamed() -> Explanation:
    """Three streams with one account each, and what is read of them."""
    e = told("collapsed")
    e.info.model["streams"] = {"collapsed": STREAMS}
    for name in ("writers", "neurons", "norm_weights"):
        mine = [getattr(e, name).assign(stack=stack) for stack in STREAMS]
        setattr(e, name, pd.concat(mine, ignore_index=True))
    for k, stack in enumerate(STREAMS):
        e.writers.loc[e.writers["stack"] == stack, ["write", "share"]] *= 1 + k / 10
    return e


def test_names_of_stacks_that_are_numbered_in_order_are_one() -> None:
    assert runs_of([*STREAMS, "collapsed"]) == ["stream_0 to stream_2", "collapsed"]
    assert runs_of(["stream_0", "stream_1", "stream_3"]) == ["stream_0", "stream_1", "stream_3"]
    assert runs_of(["encoder", "decoder"]) == ["encoder", "decoder"] and runs_of([]) == []


def test_what_is_the_same_is_said_once_with_all_names() -> None:
    said = said_once([("a", ["One.", "Two."]), ("b", ["One.", "Three."]), ("", ["Four."])])
    assert said == ["a and b: One.", "a: Two.", "b: Three.", "Four."]


@pytest.mark.parametrize("record", [{}, {"streams": None}, {"streams": [1]}, {"streams": {"a": None}}])
def test_a_record_without_streams_has_none(record: dict) -> None:
    assert stream_sets(record) == {}


def test_streams_that_the_same_steps_write_are_told_together() -> None:
    e = streamed()
    said = [s for s in story_in_words(e) if "Dim 5" in s]
    up = e.writers[(e.writers["dim"] == 5) & (e.writers["role"] == "up")]["write"]
    assert len(said) == 1 and tells(said, "stream_0 to stream_2", number(up.min()), number(up.max()), "layer 1")


def test_a_stream_that_another_step_writes_is_told_apart() -> None:
    e = streamed()
    other = (e.writers["stack"] == "stream_1") & (e.writers["role"] == "up")
    e.writers.loc[other, "submodule"] = "attn_out"
    said = [s for s in story_in_words(e) if "Dim 5" in s]
    assert (
        len(said) == 2 and tells(said, "stream_1: ", "attn_out") and tells(said, "stream_0 and stream_2: ", "mlp_out")
    )


def test_more_than_all_of_it_is_no_share() -> None:
    assert portion([0.5], "it") == f"{percent(0.5)} of it" and portion([1 + 1e-6], "it") == f"{percent(1)} of it"
    assert "%" not in portion([2.47], "it") and number(2.47) in portion([2.47], "it")
    assert tells([portion([0.5, -1.2], "it")], number(0.5), number(-1.2)) and "%" not in portion([0.5, -1.2], "it")
    e = told()
    e.decomposition["energy_share"] = 2.47
    (said,) = tells(story_in_words(e), "energy", number(2.47))
    assert percent(2.47) not in said


TOLD = ("heads", "axes", "trajectory", "decomposition", "sinks", "writers", "neurons", "states")
FLOATS = [(name, c) for name in TOLD
          for c, (dtype, _) in Explanation.TABLES[name].items() if dtype == "float64"]  # fmt: skip


@pytest.mark.parametrize(("name", "column"), FLOATS)
def test_what_is_unavailable_is_never_called_nan(name: str, column: str) -> None:
    """Each number of each table unavailable: everywhere, and where findings are read alone."""
    e = told()
    row = _fill("states", layer=1, submodule="ssm_out", position_class="start", distance=1)
    e.states = frame("states", [row, row | {"distance": 2}])
    for some in (False, True):
        broken = copy.deepcopy(e)
        table = getattr(broken, name)
        table.loc[table["layer"] > 1 if some else table["layer"] >= 0, column] = np.nan
        assert not [s for s in story_in_words(broken) if re.search(r"\bnan\b", s, re.IGNORECASE)]


def test_one_update_alone_is_not_called_constant() -> None:
    """What one query gets differs from nothing: its cosine with others is unavailable, the energy is known."""
    e = told()
    e.decomposition[["constancy", "cosine"]] = 0.0, np.nan
    (said,) = tells(story_in_words(e), "energy", percent(e.decomposition["energy_share"].iloc[0]))
    assert percent(0) not in said


def test_states_without_ordinary_tokens_are_told_and_the_null_said_to_be_missing() -> None:
    """Every token has findings: no ratio is known, what is known is told, and why there is no more."""
    e = told()
    row = _fill("states", layer=1, submodule="ssm_out", position_class="start", distance=1)
    e.states = frame("states", [row | {"influence": 0.42, "influence_random": np.nan, "ratio": np.nan, "n_random": 0}])
    (said,) = tells(story_in_words(e), "States", percent(0.42), "ssm_out")
    assert "ordinary" in said


def test_one_stack_of_streams_is_told_in_full_and_of_each_other_one_line() -> None:
    scan = synthetic.streams()
    _, _, _, head, *words = answer_in_words(scan)
    assert tells([head], "stream_0 to stream_2 and collapsed", "not in stream_3")
    of = {name: [w for w in words if w.startswith(f"{name}: ")] for name in (*STREAMS, "stream_3", "collapsed")}
    assert {name: len(said) for name, said in of.items() if name != "collapsed"} == dict.fromkeys(list(of)[:4], 1)
    assert len(of["collapsed"]) > 3
    first = passing(scan.clusters[scan.clusters["stack"] == "stream_1"]).iloc[0]
    most = scan.layers.loc[scan.layers["stack"] == "stream_1", "max"].max()
    assert tells(of["stream_1"], f"dim {first['dim']}", number(first["ratio"]), number(most))
    near = scan.near_misses[scan.near_misses["stack"] == "stream_3"]["ratio"].max()
    assert tells(of["stream_3"], "no findings", number(near))


def test_streams_stand_side_by_side_in_a_terminal() -> None:
    scan = synthetic.streams()
    console = Console(file=io.StringIO(), width=80)
    show(scan, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\ncollapsed\n" in text and "\nstream_1\n" not in text
    rows = {line.split()[0]: line.split()[1:] for line in text.split("side by side", 1)[1].splitlines() if line.strip()}
    at_5 = scan.layers[scan.layers["layer"] == 5].set_index("stack")["top1"]
    known = at_5.reindex([*STREAMS, "stream_3", "collapsed"])
    assert rows["5"] == [cell(x) for x in known]


def test_rules_that_say_something_else_of_a_stream_are_named() -> None:
    scan = synthetic.streams()
    rows = [_fill("criteria", stack=stack, site="resid_post", criterion=rule, verdict=said, layers="[2]", dims="[]")
            for stack in (*STREAMS, "stream_3", "collapsed")
            for rule, said in (("sun2024", "yes"), ("an2025", "yes" if stack == "stream_1" else "no"))]  # fmt: skip
    scan.criteria = frame("criteria", rows)
    words = answer_in_words(scan)
    assert tells(words, "stream_1: ", "an2025 says yes") and not tells(words, "stream_2: ", "an2025 says")
    (said,) = tells(words, "disagree")
    of = said.partition(":")[0]
    assert "stream_0" in of and "collapsed" in of and "stream_1" not in of


def test_a_column_of_words_is_not_broken_into_letters() -> None:
    """In 80 columns, where layers mix tokens in several ways."""
    scan = synthetic.massive()
    scan.layers["mixer"] = ["", *["attention+ssm", "linear_attn"] * 16]
    console = Console(file=io.StringIO(), width=80)
    show(scan, console)
    words = console.file.getvalue().split()  # type: ignore[attr-defined]
    assert {"mixer", "attention+ssm", "linear_attn", "massive", "onset"} <= set(words)


@pytest.mark.parametrize("column", ["before", "value", "kept", "kept_between"])
def test_a_rise_of_which_something_is_unknown_is_told_without_nan(column: str) -> None:
    scan = synthetic.massive()
    scan.layers["mixer"] = ["", *["attention", "ssm"] * 16]
    rise = _fill("rises", site="resid_post", dim=7, layer=2, mixer="ssm", next_mixer="attention", next_attention=5)
    scan.rises = frame("rises", [rise | {"kept": 1.4, column: np.nan}])
    scan.layers.loc[30, "median"] = scan.clusters.loc[0, "per_sequence"] = np.nan
    (said,) = tells(answer_in_words(scan), "Dim 7 rises")
    assert not [s for s in answer_in_words(scan) if re.search(r"\bnan\b", s, re.IGNORECASE)]
    assert column == "kept" or (number(1.4) in said and percent(1.4) not in said)
