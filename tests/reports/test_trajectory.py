"""The words, the tables and the figure of a trajectory: right for planted ones, and whole for odd ones."""

from __future__ import annotations

import io
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from massact.records.kinds.trajectory import CheckpointRecord, Emergence, StackSummary, Trajectory, TrajectoryInfo
from massact.records.tables import columns_of, frame
from massact.reports import draw, show, to_json, trajectory_in_words
from massact.reports.kinds.trajectory.tables import MOST_ROWS
from tests.facts import tells

RULE = {"name": "sun2024", "formula": "|h| > magnitude and |h| >= ratio x median|h|", "kind": "element",
        "source": "", "thresholds": {"magnitude": 100.0, "ratio": 1000.0}}  # fmt: skip
STEPS = [0.0, 1.0, 10.0, 1000.0, 143_000.0]
TOPS = [1.0, 50.0, 99.0, 200.0, 900.0]


def made(names: list[str], steps: list[float], tops: list[float], stacks: tuple[str, ...] = ("",),
         layers: int = 4) -> Trajectory:  # fmt: skip
    """Of the checkpoints `names`, layers from 2 on hold `tops` over a median of 0.05."""
    records, rows = [], []
    for name, step, top in zip(names, steps, tops, strict=True):
        found = top > 100
        for stack in stacks:
            for layer in range(layers + 1):
                h = top if layer >= 2 else 1.0
                blank = {c: 1.0 for c, (d, _) in columns_of("revisions").items() if d == "float64"}
                rows.append(blank | {
                    "revision": name, "step": step, "stack": stack, "site": "resid_post", "layer": layer, "top1": h,
                    "median": 0.05, "ratio": h / 0.05, "ratio_max": h / 0.04, "n_findings": int(found and layer >= 2),
                    "found": found and layer >= 2,
                })  # fmt: skip
        of = [StackSummary(s, "resid_post", 3 * found, 2 if found else None, layers if found else None,
                           [7, 9] if found else [], 2, top, 0.05, top / 0.05, top / 0.04) for s in stacks]  # fmt: skip
        records.append(CheckpointRecord(name, step, name, "ok", stacks=of))
    having = [i for i, top in enumerate(tops) if top > 100]
    emergence = []
    if having:
        i, last = having[0], having[-1]
        gone = names[last + 1] if last + 1 < len(names) else None
        without = [n for n, top in list(zip(names, tops, strict=True))[i:] if top <= 100]
        before = names[i - 1] if i else None
        emergence = [Emergence(s, "resid_post", names[i], before, 2, [7, 9], [7, 9], without, gone) for s in stacks]
    info = TrajectoryInfo(model={"id": "org/name"}, status="ok", criterion=RULE, checkpoints=records,
                          emergence=emergence)  # fmt: skip
    return Trajectory(info, frame("revisions", pd.DataFrame(rows)))


def growing() -> Trajectory:
    return made([f"step{s:.0f}" for s in STEPS], STEPS, TOPS)


def hostile() -> Trajectory:
    names = ["[red]x[/]", "$x_1$", "a\nb", "\u202eabc", "\u4e2d" * 60, "\x1b[31m", "c\\udcff", ""]
    t = made(names, [math.nan] * len(names), [math.inf, math.nan, 0.0, -1.0, 1e300, 5.0, 200.0, 200.0])
    t.info.notes = ["[bold]note[/]", "\x1b"]
    t.info.checkpoints.append(CheckpointRecord("[/]", math.nan, "f", "failed", "[nope] \x1b \udcff"))
    return t


EVERY = {
    "growing": growing,
    "hostile": hostile,
    "one": lambda: made(["main"], [math.nan], [500.0]),
    "none": lambda: Trajectory(TrajectoryInfo(criterion=RULE, checkpoints=[CheckpointRecord("a", 1.0, "a")])),
    "quiet": lambda: made(["a", "b"], [1.0, 2.0], [1.0, 2.0]),
    "two stacks": lambda: made(["a", "b", "c"], [0.0, 5.0, 9.0], [1.0, 500.0, 1.0], ("encoder", "decoder")),
    "many": lambda: made([f"step{i}" for i in range(0, 154_000, 1000)], list(np.arange(0, 154_000, 1000.0)),
                         [float(i) for i in range(154)], layers=32),
    "same step": lambda: made(["a", "b"], [0.0, 0.0], [1.0, 200.0]),
    "bare": lambda: Trajectory(replace(growing().info, criterion={}, model={}), growing().revisions),
}  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_words_tables_json_and_figure_of_everything(name: str, tmp_path: Path) -> None:
    t = EVERY[name]()
    for encoding in ("utf-8", "ascii"):
        file = io.TextIOWrapper(io.BytesIO(), encoding)
        show(t, Console(file=file, width=100))
        file.flush()
        printed = file.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
        assert printed.strip() and "\x1b" not in printed and "\u202e" not in printed
    assert json.loads(to_json(t))["revisions"] is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = draw(t, tmp_path)
    assert [p.name for p in paths] == ["trajectory.png"]
    with Image.open(paths[0]) as image:
        assert np.asarray(image.convert("L")).std() > 1
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in draw(EVERY[name](), tmp_path / "again")]


def test_words_say_when_where_and_whether_they_stay() -> None:
    said = trajectory_in_words(growing())
    assert tells(said, "Yes", f"{sum(top > 100 for top in TOPS)} of {len(TOPS)} checkpoints", "org/name")
    assert tells(said, "between step10 and step1000", "layer 2", "dims 7 and 9", "stay")
    assert tells(said, "18,000 at step143000", "layer 2", "20 at step0")


@pytest.mark.parametrize(("tops", "onset", "course"), [
    ([200, 200, 200], "before a", ("stay", "all later")),
    ([1, 200, 200], "between a and b", ("stay",)),
    ([1, 1, 200], "between b and c", ("last checkpoint",)),
    ([1, 200, 1], "between a and b", ("vanish", "from c on")),
    ([200, 1, 200], "before a", ("at the end", "not at b")),
])  # fmt: skip
def test_words_of_every_course(tops: list[float], onset: str, course: tuple[str, ...]) -> None:
    verdict, words, *_ = trajectory_in_words(made(["a", "b", "c"], [1.0, 2.0, 3.0], tops))
    assert tells([verdict], "Yes", f"{sum(top > 100 for top in tops)} of 3 checkpoints")
    assert tells([words], onset, "layer 2", "dims 7 and 9", *course)
    courses = ("stay", "last checkpoint", "vanish", "not at b")
    assert [c for c in courses if tells([words], c)] == [c for c in courses if c in course]


def test_no_checkpoint_has_them() -> None:
    words = trajectory_in_words(made(["a", "b", "c"], [1.0, 2.0, 3.0], [1, 2, 3]))
    assert tells(words[:1], "No", "none of 3 checkpoints", "org/name") and not tells(words, "dims")


def test_what_failed_and_what_waits_is_said() -> None:
    t = growing()
    t.info.status = "interrupted"
    t.info.checkpoints += [CheckpointRecord("step2", 2.0, "step2", "failed", "No such file."),
                           CheckpointRecord("step3", 3.0, "step3")]  # fmt: skip
    t.info.dynamics = [{"stack": "", "site": "resid_post", "layer": 0, "r2": "nan", "reason": "5 points"}]
    said = trajectory_in_words(t)
    assert tells(said, "step2", "not", t.info.checkpoints[-2].error)
    assert tells(said, "No Hidden-Dynamics", t.info.dynamics[0]["reason"])
    assert tells(said, "1 checkpoint", "not", t.info.status)


def test_long_tables_are_cut_and_keep_what_matters() -> None:
    file = io.StringIO()
    show(EVERY["many"](), Console(file=file, width=120))
    lines = [line for line in file.getvalue().splitlines() if line.startswith(("step", "..."))]
    rows = [line.split()[0] for line in lines if line.startswith("step")]
    assert len(rows) <= MOST_ROWS and {"step0", "step153000", "step100000", "step101000"} <= set(rows)
    assert any(line.startswith("...") for line in lines)
